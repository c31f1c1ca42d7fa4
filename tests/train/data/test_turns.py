"""Where an answer begins and ends, under templates of every kind."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from localllm.errors import InvalidRequest
from localllm.tokenizer import Tokenizer, load_tokenizer
from localllm.train.data.example import Example
from localllm.train.data.formats import Chat, Completion
from localllm.train.data.joining import follow
from localllm.train.data.masks import Made, Masker
from tests.examples import examples
from tests.tokenizer.conftest import Make
from tests.tokenizer.templates import GEMMA3, SMOLLM3
from tests.train.data.templates import (
    CATALOG,
    ENDLESS,
    LAST_ENDS,
    MARKED,
    OPENS_A_THOUGHT,
    REFUSES_PROMPTS,
    REWRITES,
    SHUFFLES,
    WITHOUT_PROMPT,
)

TOKENS = sorted({token for known in CATALOG.values() for token in known.special})
WORDS = [
    *("Hello", " you", "\n", "\n\n", "  ", "a", "{{ x }}", "{% endfor %}", "assistant", "<think>"),
    *("\n</think>\n", "model\n", "[", "</", "<|", "|>", "_id|>", "é", "日本", "\0", "\ue000"),
    "\U00100000",
]
PIECES = st.one_of(st.sampled_from(WORDS), st.sampled_from(TOKENS), st.text(max_size=4))
TEXTS = st.lists(PIECES, min_size=1, max_size=5).map("".join).filter(lambda text: text.strip())
DATE = {"date_string": "26 Jul 2024"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def chat(*contents: str, system: str | None = None) -> Chat:
    said = [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]
    return Chat(tuple([{"role": "system", "content": system}] if system else []) + tuple(said))


def made(tokenizer: Tokenizer, said: Chat, train_on: str = "assistant") -> Made:
    return Masker(tokenizer, train_on, None).chat(said, "x:1")


def answers(tokenizer: Tokenizer, examples: tuple[Example, ...]) -> list[tuple[list[int], str]]:
    """(the ids before, the text with control tokens spelled) of each run that is trained."""
    found = []
    for example in examples:
        at, ids = 0, example.tokens.tolist()
        for on, run in groupby(example.trained.tolist()):
            length = len(list(run))
            if on:
                text = tokenizer.decode(ids[at : at + length], skip_special=False)
                found.append((ids[:at], text))
            at += length
    return found


@pytest.mark.parametrize("name", CATALOG)
@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(TEXTS, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0),
    system=st.none() | TEXTS,
)
def test_every_answer_is_trained_behind_the_very_prompt_that_serving_gives(
    name: str,
    contents: list[str],
    system: str | None,
    build: Make,
) -> None:
    known = CATALOG[name]
    tokenizer = build(known)
    said = chat(*contents, system=system if known.system else None)
    found = made(tokenizer, said)
    messages = list(said.messages)
    prompts = [
        tokenizer.apply_chat(messages[:n], **DATE)
        for n, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    trained = answers(tokenizer, found.examples)
    assert [before for before, _ in trained] == prompts
    assert found.unlike == found.endless == 0
    for (before, text), n in zip(
        trained, range(len(messages) - len(contents) + 1, len(messages), 2), strict=True
    ):
        # What is trained is what rendering the answer adds, up to the first token that ends it.
        whole = tokenizer.render_control(messages[: n + 1], **DATE)
        stops = sorted(at for at, token in whole.control.items() if token in tokenizer.eos_ids)
        begin = len(tokenizer.render_control(messages[:n], add_generation_prompt=True, **DATE).text)
        end = next(at for at in stops if at >= begin)
        stop = tokenizer.decode([whole.control[end]], skip_special=False)
        assert text == whole.text[begin:end] + stop
        assert messages[n]["content"].strip() in text or "</think>" in messages[n]["content"]
        assert sum(token in tokenizer.special_ids for token in before) == sum(
            at < begin for at in whole.control
        )


@pytest.mark.parametrize("name", ["Llama 3", "Qwen 2.5", "Qwen3"])
def test_calls_are_trained_and_what_tools_give_back_is_not(
    name: str,
    build: Make,
) -> None:
    tokenizer = build(CATALOG[name])
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12 degrees"},
        {"role": "assistant", "content": "It is mild."},
    ]
    found = made(tokenizer, Chat(tuple(messages), tuple(TOOLS)))
    trained = answers(tokenizer, found.examples)
    prompts = [tokenizer.apply_chat(messages[:n], tools=TOOLS, **DATE) for n in (1, 3)]
    assert [before for before, _ in trained] == prompts
    assert "Zürich" in trained[0][1]
    assert "mild" in trained[1][1]
    assert not any("degrees" in text for _, text in trained)


def test_an_opened_thought_in_the_prompt_does_not_move_the_answer(build: Make) -> None:
    tokenizer = build(OPENS_A_THOUGHT)
    for answer in ("<b>yes</b>", "<think", "yes"):
        found = made(tokenizer, chat("q", answer))
        assert [text for _, text in answers(tokenizer, found.examples)] == [answer + "<|im_end|>"]
        assert found.unlike == 1
    # With its thought the answer goes on where the prompt stops.
    found = made(tokenizer, chat("q", "<think>\nhm\n</think>\nyes"))
    assert [text for _, text in answers(tokenizer, found.examples)] == [
        "hm\n</think>\nyes<|im_end|>"
    ]
    assert found.unlike == 0


def test_without_a_prompt_of_its_own_the_model_learns_the_header(build: Make) -> None:
    tokenizer = build(WITHOUT_PROMPT)
    found = made(tokenizer, chat("q", "yes"))
    assert [text for _, text in answers(tokenizer, found.examples)] == [
        "<|im_start|>assistant\nyes<|im_end|>"
    ]


def test_marks_of_the_template_are_kept_and_the_end_is_learned(build: Make) -> None:
    tokenizer = build(MARKED)
    found = made(tokenizer, chat("q", "one", "q", "hush two", "q", "three"))
    texts = [text for _, text in answers(tokenizer, found.examples)]
    assert texts == ["one<|im_end|>", "three<|im_end|>"]
    assert (found.unmarked, len(found.examples)) == (1, 1)


def test_a_header_within_the_marks_is_the_prompts(build: Make) -> None:
    tokenizer = build(SMOLLM3)
    found = made(tokenizer, chat("q", "one", "q", "two"))
    texts = [text for _, text in answers(tokenizer, found.examples)]
    assert texts == ["one<|im_end|>", "two<|im_end|>"]


def test_turns_without_an_end_are_told_and_end_with_their_text(build: Make) -> None:
    tokenizer = build(ENDLESS)
    found = made(tokenizer, chat("q", "one", "q", "two"))
    assert found.endless == 2
    assert [text for _, text in answers(tokenizer, found.examples)] == ["one\n", "two\n"]


def test_the_end_of_a_later_turn_is_not_an_earlier_ones(build: Make) -> None:
    tokenizer = build(LAST_ENDS)
    found = made(tokenizer, chat("q", "one", "other", "two"))
    assert [text for _, text in answers(tokenizer, found.examples)] == [
        "one<|im_end|>",
        "two<|im_end|>",
    ]
    assert found.expanded


def test_a_question_that_is_rewritten_once_past_is_never_trained(build: Make) -> None:
    tokenizer = build(REWRITES)
    found = made(tokenizer, chat("question", "one", "other", "two"))
    texts = [text for _, text in answers(tokenizer, found.examples)]
    assert texts == ["one<|im_end|>", "two<|im_end|>"]
    assert found.unlike == 2


def test_a_template_that_renders_no_prompts_is_masked_all_the_same(build: Make) -> None:
    tokenizer = build(REFUSES_PROMPTS)
    found = made(tokenizer, chat("q", "one", "q", "one more"))
    texts = [text for _, text in answers(tokenizer, found.examples)]
    assert texts == ["one<|eot_id|>", "one more<|eot_id|>"]


def test_the_assistant_may_speak_first(build: Make) -> None:
    tokenizer = build(CATALOG["Qwen 2.5"])
    messages = [{"role": "assistant", "content": "Hi!"}, *chat("q", "one").messages]
    found = made(tokenizer, Chat(tuple(messages)))
    texts = [text for _, text in answers(tokenizer, found.examples)]
    assert texts == ["Hi!<|im_end|>", "one<|im_end|>"]


def test_where_nothing_shows_the_answer_it_is_an_error(build: Make) -> None:
    with pytest.raises(InvalidRequest, match=r"x:1: .* where the answer begins") as error:
        made(build(SHUFFLES), chat("q", "a rather long answer"))
    assert "--train-on all" in (error.value.hint or "")
    (example,) = made(build(SHUFFLES), chat("q", "answer"), "all").examples
    assert example.targets == len(example) - 1


@given(before=TEXTS, after=TEXTS)
@settings(max_examples=examples(200), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_text_that_follows_says_the_same_and_changes_nothing_before(
    before: str,
    after: str,
    build: Make,
) -> None:
    tokenizer = build(CATALOG["SmolLM2"])
    rest, merged = follow(tokenizer, [before], [after])
    assert b"".join(map(tokenizer.token_bytes, rest)) == after.encode()
    head, whole = tokenizer.encode_runs([before]), tokenizer.encode_runs([before + after])
    assert merged == (whole[: len(head)] != head)
    assert merged or [*head, *rest] == whole


@pytest.mark.parametrize("after", ["world", " world", "\nworld", "\n\n\nx", "é", "'s it", "  "])
@pytest.mark.parametrize("before", ["Hello", "Hello ", "a\n", "a\n\n", "1"])
def test_a_sentencepiece_text_that_follows_gets_no_space_of_its_own(
    before: str,
    after: str,
    gemma3_tokenizer: Tokenizer,
) -> None:
    rest, _ = follow(gemma3_tokenizer, [before], [after])
    assert b"".join(map(gemma3_tokenizer.token_bytes, rest)) == after.encode()


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """In the manner of Llama 2: a space is put before every text."""
    words = ["▁", *"▁Hello world", "▁w", "wo", "▁wo", "ld", "lo"]
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{n:02X}>": n + 2 for n in range(256)}}
    for word in words:
        vocab.setdefault(word, len(vocab))
    merges = [("▁", "w"), ("w", "o"), ("▁w", "o"), ("l", "d"), ("l", "o")]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    inner.add_special_tokens([tokenizers.AddedToken("</s>", normalized=False, special=True)])
    folder = tmp_path_factory.mktemp("spaced")
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    found = load_tokenizer(folder)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("before", "after"), [("Hello", "world"), ("Hello", " world"), ("Hello ", "world"), ("", "wo")]
)
def test_what_puts_a_space_before_a_text_puts_none_inside(
    before: str, after: str, spaced: Tokenizer
) -> None:
    (example,) = (
        Masker(spaced, "assistant", None).completion(Completion(before, after), "x:1").examples
    )
    assert spaced.decode(example.tokens.tolist()) == before + after
    if before:
        ids = example.tokens[~example.trained].tolist()
        assert ids == spaced.encode(before)
        assert b"".join(map(spaced.token_bytes, example.tokens[example.trained])) == (
            after.encode() + b"</s>"
        )


def test_the_real_smollm2_learns_its_answers(smollm2_tokenizer: Tokenizer) -> None:
    said = chat("Hello <|im_end|>", "\n\none", "and?", "two\n")
    found = made(smollm2_tokenizer, said)
    trained = answers(smollm2_tokenizer, found.examples)
    assert [text for _, text in trained] == ["\n\none<|im_end|>", "two\n<|im_end|>"]
    prompts = [smollm2_tokenizer.apply_chat(list(said.messages[:n])) for n in (1, 3)]
    assert [before for before, _ in trained] == prompts


def test_the_real_gemma3_learns_its_answers(gemma3_tokenizer: Tokenizer) -> None:
    said = chat("Hello <end_of_turn>", "one", "and?", " two", system="Be brief.")
    found = Masker(gemma3_tokenizer, "assistant", GEMMA3.template).chat(said, "x:1")
    trained = answers(gemma3_tokenizer, found.examples)
    assert [text for _, text in trained] == ["one<end_of_turn>", "two<end_of_turn>"]
    prompts = [
        gemma3_tokenizer.apply_chat(list(said.messages[:n]), chat_template=GEMMA3.template)
        for n in (2, 4)
    ]
    assert [before for before, _ in trained] == prompts
    assert all(np.array_equal(e.tokens[:1], [gemma3_tokenizer.bos_id]) for e in found.examples)
