"""The library: prompts, lists of prompts, streams, chats, threads, and what is refused."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import localllm
from localllm import LLM, SamplingParams
from localllm.errors import (
    BackendUnavailable,
    InvalidRequest,
    LocalLLMError,
    ModelNotFound,
    OutOfMemoryPlan,
    PromptTooLong,
    TemplateError,
    UnsupportedModel,
)
from tests.tiny_model import EOS, VOCAB, write_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(str(folder), backend="reference") as model:
        yield model


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder without a tokenizer."""
    folder = write_tiny_model(tmp_path_factory.mktemp("bare"), tokenizer=False)
    with LLM(str(folder), backend="reference") as model:
        yield model


def test_one_prompt_gives_one_result_with_everything_in_it(llm):
    result = llm.generate("Hello", GREEDY)
    assert result.text == llm.tokenizer.decode(result.token_ids)
    assert len(result.token_ids) == 8
    assert result.finish_reason == "length"
    assert result.logprobs is None
    assert result.receipt.prompt_tokens == len(result.prompt_token_ids) == 5
    assert result.receipt.generated_tokens == 8
    assert result.receipt.backend == "reference"
    json.dumps(result.to_dict())


def test_text_and_its_token_ids_are_the_same_prompt(llm):
    ids = llm.tokenizer.encode("Hello")
    for prompt in (ids, tuple(ids), np.array(ids)):
        assert llm.generate(prompt, GREEDY).token_ids == llm.generate("Hello", GREEDY).token_ids


def test_a_list_of_prompts_gives_a_list_equal_to_each_alone(llm):
    prompts = ["one", "a much longer prompt than the others", [1, 2, 3], "x"]
    together = llm.generate(prompts, GREEDY)
    assert [r.token_ids for r in together] == [llm.generate(p, GREEDY).token_ids for p in prompts]
    assert llm.generate([], GREEDY) == []
    assert [r.token_ids for r in llm.generate(["one"], GREEDY)] == [together[0].token_ids]


def test_params_may_be_one_for_each(llm):
    each = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 5)]
    assert [len(r.token_ids) for r in llm.generate(["a", "b"], each)] == [2, 5]
    with pytest.raises(InvalidRequest, match="each of the 2 prompts"):
        llm.generate(["a", "b"], each[:1])
    with pytest.raises(InvalidRequest, match="each of the 1 prompts"):
        llm.generate("a", each)


def test_greedy_follows_the_argmax_of_the_logits(llm):
    result = llm.generate("abc", GREEDY)
    sequence = [*result.prompt_token_ids, *result.token_ids]
    logits = llm.logits(sequence)
    assert logits.shape == (len(sequence), VOCAB)
    assert logits.dtype == np.float32
    assert logits[2:-1].argmax(axis=1).tolist() == list(result.token_ids)


def test_logprobs_are_those_of_the_logits(llm):
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=6, logprobs=3, ignore_eos=True)
    result = llm.generate("abc", params)
    logits = llm.logits([*result.prompt_token_ids, *result.token_ids])[2:-1].astype(np.float64)
    exact = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    assert len(result.logprobs) == 6
    for row, token_id, entry in zip(exact, result.token_ids, result.logprobs, strict=True):
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(row[token_id], abs=1e-4)
        assert [i for i, _ in entry.top] == np.argsort(-row, kind="stable")[:3].tolist()


def test_float32_activations_come_nearer_to_the_exact_logits(smollm2):
    ids = [504, 3575, 282, 4649, 314]
    with LLM(str(smollm2), backend="reference") as model:
        exact = model.logits(ids)
    errors = {}
    for activations in (None, "int8", "float32"):
        with LLM(str(smollm2), backend="cpu", activations=activations) as model:
            assert model.info.activations == (activations or "int8")
            errors[activations] = np.abs(model.logits(ids) - exact).max()
    assert errors["float32"] < errors["int8"] / 5
    assert errors[None] == errors["int8"]


def test_activations_that_the_only_backend_left_lacks_are_refused(folder, monkeypatch):
    def refuse(*_, **__):
        raise UnsupportedModel("layer 0 is too odd")

    monkeypatch.setattr("localllm.backend.cpu.CpuBackend.__init__", refuse)
    with pytest.raises(InvalidRequest, match=r"not on cpu: layer 0 is too odd; the reference"):
        LLM(str(folder), activations="int8")
    with LLM(str(folder), activations="float32") as model:
        assert model.info.backend == "reference"


def test_the_same_seed_gives_the_same_answer_alone_or_in_a_batch(llm):
    params = SamplingParams(temperature=1.2, seed=99, max_tokens=12, ignore_eos=True)
    alone = llm.generate("seed", params)
    batch = llm.generate(["other", "seed", "third one"], params)
    assert batch[1].token_ids == alone.token_ids
    assert alone.receipt.seed == 99
    fresh = llm.generate("seed", SamplingParams(temperature=1.2, max_tokens=12, ignore_eos=True))
    again = SamplingParams(temperature=1.2, seed=fresh.receipt.seed, max_tokens=12, ignore_eos=True)
    assert llm.generate("seed", again).token_ids == fresh.token_ids


def test_the_end_token_ends_the_answer_and_is_not_part_of_it(llm):
    params = SamplingParams(temperature=0, max_tokens=8, logit_bias={EOS: 1e4})
    result = llm.generate("Hello", params)
    assert (result.finish_reason, result.receipt.stopped_by) == ("stop", "eos")
    assert (result.text, result.token_ids) == ("", ())


def test_a_stop_string_cuts_the_text_across_token_borders(llm):
    whole = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    stop = whole.text[3:6]  # every token is one byte, so this spans several
    at = whole.text.index(stop)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=stop)
    result = llm.generate("Hello", params)
    assert result.text == whole.text[:at]
    assert (result.finish_reason, result.receipt.stopped_by) == ("stop", "stop string")
    streamed = list(llm.stream("Hello", params))
    assert "".join(delta.text for delta in streamed) == whole.text[:at]


def test_a_stream_adds_up_to_the_result(llm):
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=20, logprobs=0, ignore_eos=True)
    prompts = ["first", "the second"]
    whole = llm.generate(prompts, params)
    deltas = list(llm.stream(prompts, params))
    for index, expected in enumerate(whole):
        own = [d for d in deltas if d.index == index]
        assert "".join(d.text for d in own) == expected.text
        assert [i for d in own for i in d.token_ids] == list(expected.token_ids)
        assert [e for d in own for e in d.logprobs or ()] == list(expected.logprobs)
        assert [d.finish_reason for d in own] == [None] * (len(own) - 1) + ["length"]
        assert own[-1].result.text == expected.text


def test_cancelling_a_stream_keeps_what_was_said(llm):
    stream = llm.stream("Hello", SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    deltas = [next(stream) for _ in range(3)]
    stream.cancel()
    deltas += list(stream)
    result = deltas[-1].result
    assert result.finish_reason == "cancelled"
    assert len(result.token_ids) == 3
    assert result.text == "".join(d.text for d in deltas)
    assert llm.generate("Hello", GREEDY).finish_reason == "length", "the model goes on"


def test_leaving_a_stream_early_frees_its_place(folder):
    with LLM(str(folder), backend="reference", max_batch=1) as llm:
        with llm.stream("Hello", SamplingParams(max_tokens=None, ignore_eos=True)) as stream:
            next(stream)
        assert len(llm.generate("x", GREEDY).token_ids) == 8


def test_a_stream_that_nobody_holds_ends_at_once(llm):
    endless = SamplingParams(max_tokens=None, ignore_eos=True)
    for _ in llm.stream("Hello", endless):
        break
    llm.stream("never read", endless)
    assert llm.pump.load().running + llm.pump.load().waiting == 0


def test_chat_renders_the_template_and_user_text_stays_text(llm):
    messages = [{"role": "user", "content": "say <|end|> please"}]
    ids = llm.chat_prompt(messages)
    assert ids[0] == 257
    assert ids[-2:] == [EOS, 258]
    assert EOS not in ids[1:-2], "special-token text in a message is only text"
    assert llm.chat(messages, GREEDY).prompt_token_ids == tuple(ids)
    streamed = "".join(d.text for d in llm.stream_chat(messages, GREEDY))
    assert streamed == llm.chat(messages, GREEDY).text


def test_a_chat_tells_reasoning_and_calls_from_the_answer(llm):
    messages = [{"role": "user", "content": "Add"}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    said = r'<think>hm</think>So\.<tool_call>\{"name": "add", "arguments": \{"a": 1\}\}</tool_call>'
    params = SamplingParams(temperature=0, max_tokens=200, regex=said)
    result = llm.chat(messages, params, tools=tools)
    assert (result.text, result.reasoning) == ("So.", "hm")
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("add", {"a": 1})]
    deltas = list(llm.stream_chat(messages, params, tools=tools))
    assert "".join(delta.text for delta in deltas) == "So."
    assert "".join(delta.reasoning for delta in deltas) == "hm"
    assert llm.generate("Add", params).text.startswith("<think>hm</think>So.<tool_call>")


def test_reasoning_that_the_template_cannot_be_told_is_refused(llm):
    with pytest.raises(InvalidRequest, match="cannot be told reasoning 'high'"):
        llm.chat([{"role": "user", "content": "hi"}], GREEDY, reasoning="high")


def test_a_model_without_a_template_says_so(tmp_path):
    folder = write_tiny_model(tmp_path / "m", chat_template=False)
    with LLM(str(folder), backend="reference") as llm, pytest.raises(TemplateError):
        llm.chat([{"role": "user", "content": "hi"}])
    template = "{{ messages[0]['content'] }}"
    with LLM(str(folder), backend="reference", chat_template=template) as llm:
        prompt = llm.chat_prompt([{"role": "user", "content": "hi"}])
        assert llm.tokenizer.decode(prompt) == "hi"


def test_threads_share_one_batch_and_get_their_own_answers(llm):
    prompts = [f"prompt number {i}" for i in range(8)]
    alone = [llm.generate(p, GREEDY).token_ids for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda p: llm.generate(p, GREEDY).token_ids, prompts))
    assert results == alone


def test_a_model_without_a_tokenizer_serves_token_ids(bare):
    result = bare.generate([1, 2, 3], GREEDY)
    assert bare.tokenizer is None
    assert len(result.token_ids) == 8
    assert result.text == ""
    stopped = bare.generate([1, 2, 3], SamplingParams(temperature=0, logit_bias={EOS: 1e4}))
    assert stopped.finish_reason == "stop", "config.json names the end token"
    with pytest.raises(InvalidRequest, match="token ids only"):
        bare.generate("text")
    with pytest.raises(InvalidRequest, match="token ids only"):
        bare.generate([1], SamplingParams(stop="x"))


def test_an_answer_follows_its_schema_and_ends_with_it(llm):
    schema = {"enum": ["red", "green", 17]}
    params = SamplingParams(json_schema=schema, temperature=2.0, seed=3, max_tokens=40)
    for result in llm.generate(["Hello", "colour?", [1, 2]], params):
        assert json.loads(result.text) in schema["enum"]
        assert result.finish_reason == "stop"
        assert result.receipt.stopped_by == "constraint"
        assert result.receipt.generated_tokens == len(result.token_ids) > 0


def test_constrained_and_free_requests_share_a_batch(llm):
    free = SamplingParams(temperature=0.9, seed=4, max_tokens=6, ignore_eos=True)
    chosen = SamplingParams(choices=["yes", "no"], max_tokens=6)
    alone = llm.generate("Hello", free)
    one, two = llm.generate(["Hello", "Hello"], [free, chosen])
    assert one.token_ids == alone.token_ids
    assert two.text in ("yes", "no")


def test_a_constraint_that_cannot_be_is_refused_before_anything_runs(llm, bare):
    with pytest.raises(InvalidRequest, match="regex"):
        llm.generate("Hello", SamplingParams(regex="("))
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        bare.generate([1], SamplingParams(regex="a"))
    with pytest.raises(InvalidRequest, match="dry_sequence_breakers"):
        bare.generate([1], SamplingParams(dry_multiplier=1.0))


def test_dry_takes_its_breakers_as_text(llm):
    params = SamplingParams(
        temperature=0, max_tokens=12, dry_multiplier=5.0, dry_sequence_breakers=["e"]
    )
    assert llm.generate("abcabcab", params).token_ids


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], None),
        ("", "empty"),
        ([[]], "empty"),
        ([VOCAB], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ([1, "a"], "whole numbers"),
        ([1.5], "token ids"),
        (None, "must be text"),
        (7, "must be text"),
        ({"a": 1}, "must be text"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(llm, prompt, words):
    if words is None:
        assert llm.generate(prompt) == []
        return
    with pytest.raises(InvalidRequest, match=words):
        llm.generate(prompt, GREEDY)


def test_one_bad_prompt_in_a_list_is_refused_before_anything_runs(llm):
    with pytest.raises(PromptTooLong, match="300 tokens"):
        llm.generate(["fine", [1] * 300], GREEDY)
    with pytest.raises(PromptTooLong, match="context holds 256"):
        llm.generate([1] * 256, GREEDY)
    assert len(llm.generate([1] * 255, GREEDY).token_ids) == 1
    with pytest.raises(PromptTooLong):
        llm.logits([1] * 257)


def test_a_full_context_ends_the_answer_and_says_so(llm):
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    result = llm.generate([1] * 250, params)
    assert (result.finish_reason, result.receipt.stopped_by) == ("length", "context")
    assert len(result.token_ids) == 6


def test_settings_that_make_no_sense_are_refused(folder):
    cases = [
        ({"backend": "warp"}, BackendUnavailable, "warp"),
        ({"threads": 0}, InvalidRequest, "threads"),
        ({"context": 257}, InvalidRequest, "1 to 256"),
        ({"context": 0}, InvalidRequest, "1 to 256"),
        ({"kv_tokens": 10}, InvalidRequest, "less than one context"),
        ({"kv_tokens": 10**12}, OutOfMemoryPlan, "KV cache"),
        ({"max_batch": 0}, InvalidRequest, "max_batch"),
    ]
    for settings, kind, words in cases:
        with pytest.raises(kind, match=words):
            LLM(str(folder), **{"backend": "reference", **settings})


def test_an_unknown_answer_format_is_refused_before_anything_loads():
    with pytest.raises(InvalidRequest, match="no answer format 'xml'"):
        LLM("nowhere", answer_format="xml")


def test_an_unknown_name_suggests_a_known_one():
    with pytest.raises(ModelNotFound) as error:
        LLM("smolm2:135m")
    assert "smollm2:135m" in error.value.hint


def test_a_closed_model_refuses_and_closing_twice_is_harmless(folder):
    llm = LLM(str(folder), backend="reference")
    stream = llm.stream("Hello", GREEDY)
    next(stream)
    llm.close()
    llm.close()
    assert list(stream)[-1].result.finish_reason == "cancelled"
    with pytest.raises(LocalLLMError, match="closed"):
        llm.generate("Hello", GREEDY)


def test_generation_config_gives_the_default_parameters(tmp_path):
    folder = write_tiny_model(tmp_path / "m")
    config = {"temperature": 0.3, "top_p": 0.9, "eos_token_id": [EOS, 7]}
    (folder / "generation_config.json").write_text(json.dumps(config))
    with LLM(str(folder), backend="reference") as llm:
        assert llm.default_params == SamplingParams(temperature=0.3, top_p=0.9)
        forced = SamplingParams(temperature=0, logit_bias={7: 1e4})
        assert llm.generate("a", forced).finish_reason == "stop"
        banned = SamplingParams(temperature=0, max_tokens=4, logit_bias={7: -math.inf})
        assert 7 not in llm.generate("a", banned).token_ids


def test_the_public_names_load_on_demand():
    assert localllm.LLM is LLM
    assert set(localllm.__all__) <= set(dir(localllm)) | set(localllm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        localllm.Nonsense  # noqa: B018


def test_the_native_engine_runs_by_default(folder):
    with LLM(str(folder)) as llm:
        assert (llm.info.backend, llm.info.backend_note) == ("cpu", None)
        result = llm.generate("Hello", GREEDY)
    assert result.receipt.backend == "cpu"
    assert len(result.token_ids) == 8


def test_a_model_the_native_engine_lacks_runs_on_the_reference_and_says_why(folder, monkeypatch):
    def refuse(*_, **__):
        raise UnsupportedModel("no such layer here")

    monkeypatch.setattr("localllm.backend.cpu.CpuBackend", refuse)
    with LLM(str(folder)) as llm:
        assert llm.info.backend == "reference"
        assert "not on cpu: no such layer here" in llm.info.backend_note
    with pytest.raises(UnsupportedModel, match="no such layer"):
        LLM(str(folder), backend="cpu")


def test_computed_prompts_survive_a_restart_on_disk(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path))
    prompt = [1 + i % 9 for i in range(100)]
    answers = []
    for cached in (0, 96):
        with LLM(str(folder), kv_disk=1 << 24) as llm:
            result = llm.generate(prompt, GREEDY)
        llm.close()
        assert llm.kv_disk_note is None
        assert result.receipt.cached_from_disk == cached
        answers.append(result.token_ids)
    assert answers[0] == answers[1]


def test_what_cannot_be_kept_on_disk_is_told(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path))
    (tmp_path / "kv").write_text("a file where the folder should be")
    with LLM(str(folder), kv_disk=1 << 24) as llm:
        assert len(llm.generate([1 + i % 9 for i in range(100)], GREEDY).token_ids) == 8
    llm.close()
    assert str(tmp_path / "kv") in llm.kv_disk_note
