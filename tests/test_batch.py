"""A batch answers each line as the library would, in order, whatever stands in the others."""

from __future__ import annotations

import json
import os
import threading

import pytest

from localllm import LLM, SamplingParams
from localllm.batch import BatchRun
from localllm.errors import InvalidRequest, LocalLLMError
from tests.tiny_model import write_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    with LLM(str(folder), max_batch=4) as model:
        yield model


@pytest.fixture
def batch(llm, tmp_path):
    """Runs a batch over these lines, and returns its answers and what was done."""

    def run(lines, params=GREEDY, **settings):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        write(source, lines)
        done = BatchRun(llm, source, target, params=params, max_batch=4, **settings).run()
        return read(target), done

    return run


def write(path, lines):
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in data))


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def chat(body, custom_id="c", url="/v1/chat/completions"):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def test_answers_come_in_the_order_of_the_input_and_are_the_librarys(llm, batch):
    lines = [
        {"id": f"line {i}", "prompt": f"number {i}", "params": {"max_tokens": 1 + (7 * i) % 30}}
        for i in range(40)
    ]
    answers, done = batch(lines)
    for index, (line, answer) in enumerate(zip(lines, answers, strict=True)):
        params = SamplingParams(temperature=0, ignore_eos=True, **line["params"])
        alone = llm.generate(line["prompt"], params)
        assert (answer["id"], answer["index"]) == (line["id"], index)
        assert answer["text"] == alone.text
        assert answer["token_ids"] == list(alone.token_ids)
        assert answer["finish_reason"] == "length"
        assert answer["receipt"]["generated_tokens"] == len(alone.token_ids)
    assert (done.lines, done.failed, done.resumed) == (40, 0, 0)
    assert done.new_tokens == sum(line["params"]["max_tokens"] for line in lines)


def test_a_line_is_a_text_a_list_of_ids_or_a_chat_with_parameters_of_its_own(llm, batch):
    lines = [
        {"prompt": [1, 2, 3]},
        {"messages": HELLO, "template_vars": {"mood": "good"}, "tools": []},
        {"prompt": "x", "params": {"logprobs": 2, "logit_bias": {"65": 100}, "max_tokens": 2}},
        {"prompt": "x", "params": {"stop": ["AB"], "temperature": 1.0, "seed": 5}},
    ]
    answers, _ = batch(lines)
    assert answers[0]["token_ids"] == list(llm.generate([1, 2, 3], GREEDY).token_ids)
    assert answers[1]["text"] == llm.chat(HELLO, GREEDY).text
    assert answers[2]["text"] == "bb"  # token 65
    assert [len(entry["top"]) for entry in answers[2]["logprobs"]] == [2, 2]
    assert answers[3]["receipt"]["seed"] == 5
    assert "logprobs" not in answers[3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", "not JSON"),
        (b'{"prompt": "cut', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[1]", "must be a JSON object"),
        ({}, "either 'prompt' or 'messages'"),
        ({"prompt": "x", "messages": HELLO}, "either 'prompt' or 'messages'"),
        ({"prompt": 5}, "'prompt' must be"),
        ({"prompt": ["x"]}, "'prompt' must be"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": [1, 99999]}, "outside the vocabulary"),
        ({"prompt": "x" * 1000}, "the context holds 256"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"prompt": "x", "id": 5}, "'id' must be text"),
        ({"prompt": "x", "promt": "y"}, "unknown field 'promt'"),
        ({"prompt": "x", "tools": [{}]}, "goes with 'messages'"),
        ({"prompt": "x", "params": []}, "'params' must be an object"),
        ({"prompt": "x", "params": {"temprature": 1}}, "unknown sampling parameter 'temprature'"),
        ({"prompt": "x", "params": {"temperature": -1}}, "temperature must be"),
        ({"prompt": "x", "params": {"stop": 5}}, "'stop' must be"),
        ({"prompt": "x", "params": {"logit_bias": {"a": 1}}}, "logit_bias must map"),
        ({"messages": "hello"}, "'messages' must be a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user"}]}, "'content' is missing"),
        ({"messages": HELLO, "template_vars": {"add_generation_prompt": 0}}, "add_generation"),
    ],
)
def test_a_bad_line_is_answered_by_its_error_and_stops_no_other(batch, line, message):
    answers, done = batch([{"prompt": "before"}, line, {"prompt": "after"}])
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    assert message in answers[1]["error"]["message"]
    assert "error" not in answers[0] | answers[2]
    assert (done.lines, done.failed) == (3, 1)


def test_a_failed_line_keeps_its_id(batch):
    answers, _ = batch([{"id": "mine", "prompt": ""}, {"id": "\ud800", "prompt": ""}])
    assert [answer["id"] for answer in answers] == ["mine", "\ud800"]
    assert answers[0]["error"]["hint"] == "give at least one token"


def test_a_request_that_fails_while_it_runs_is_an_error_too(llm, batch, monkeypatch):
    real = llm._model.backend.forward

    def forward(work, hidden=None):
        if any(66 in chunk.token_ids for chunk in work.chunks):
            raise RuntimeError("out of order")
        return real(work, hidden)

    monkeypatch.setattr(llm._model.backend, "forward", forward)
    answers, done = batch([{"prompt": "c"}])
    assert answers[0]["error"] == {"message": "RuntimeError: out of order", "hint": None}
    assert done.failed == 1


def test_blank_lines_a_byte_order_mark_and_a_missing_last_newline_are_no_matter(llm, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}')
    BatchRun(llm, source, target, params=GREEDY).run()
    assert [answer["text"] for answer in read(target)] == [
        llm.generate(prompt, GREEDY).text for prompt in "ab"
    ]


def test_a_line_too_long_for_memory_is_refused_and_skipped(batch, monkeypatch):
    monkeypatch.setattr("localllm.batch.source.MAX_LINE_BYTES", 100)
    answers, done = batch([{"prompt": "x" * 95}, {"prompt": "y" * 1000}, {"prompt": "z"}])
    assert [("error" in answer) for answer in answers] == [True, True, False]
    assert "longer than" in answers[1]["error"]["message"]
    assert done.lines == 3


def test_no_line_at_all_is_a_finished_batch(batch):
    answers, done = batch([])
    assert (answers, done.lines) == ([], 0)


def test_each_line_has_a_seed_of_its_own_derived_from_one(llm, batch):
    params = SamplingParams(max_tokens=8, seed=2**64 - 2, ignore_eos=True)
    lines = [{"prompt": "same"}] * 4 + [{"prompt": "same", "params": {"seed": 9}}]
    answers, _ = batch(lines, params)
    assert [a["receipt"]["seed"] for a in answers] == [2**64 - 2, 2**64 - 1, 0, 1, 9]
    assert len({a["text"] for a in answers}) > 2
    again = SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    assert llm.generate("same", again).text == answers[3]["text"]


def test_as_many_run_as_may_and_few_lines_are_held(llm, tmp_path):
    slow = {"max_tokens": 150, "speculation": "off"}
    lines = [{"prompt": "long", "params": slow}, *[{"prompt": "short"}] * 60]
    write(tmp_path / "in", lines)
    seen = []
    run = BatchRun(
        llm,
        tmp_path / "in",
        tmp_path / "out",
        params=GREEDY,
        max_batch=4,
        on_progress=lambda done: seen.append((len(run._flight), len(run._window), done.lines)),
    )
    run.run()
    assert max(running for running, _, _ in seen) == 4
    assert max(held for _, held, _ in seen) == 16
    assert seen[-1] == (0, 0, 61)


def test_only_the_first_lines_and_later_the_rest(batch):
    lines = [{"prompt": f"line {i}"} for i in range(10)]
    first, done = batch(lines, limit=4)
    assert (len(first), done.resumed) == (4, 0)
    same, done = batch(lines, limit=4)
    assert (same, done.lines, done.resumed, done.new_tokens) == (first, 4, 4, 0)
    every, done = batch(lines)
    assert every[:4] == first
    assert ([a["index"] for a in every], done.resumed) == (list(range(10)), 4)


def test_an_input_that_grew_is_gone_on_with(batch):
    lines = [{"prompt": f"line {i}"} for i in range(5)]
    first, _ = batch(lines[:3])
    every, done = batch(lines)
    assert (every[:3], len(every), done.resumed) == (first, 5, 3)


def test_a_torn_or_unsaved_end_is_computed_again(batch, tmp_path):
    lines = [{"prompt": f"line {i}"} for i in range(5)]
    whole, _ = batch(lines)
    batch(lines[:3], overwrite=True)
    with (tmp_path / "out.jsonl").open("ab") as file:
        file.write(json.dumps(whole[3]).encode() + b'\n{"id": null, "ind')
    again, done = batch(lines)
    assert [a["text"] for a in again] == [a["text"] for a in whole]
    assert done.resumed == 3


def test_another_input_or_other_parameters_are_refused(batch, tmp_path):
    lines = [{"prompt": f"line {i}"} for i in range(4)]
    before, _ = batch(lines)
    for other in (lines[:2], [*lines[:3], {"prompt": "other"}], lines[::-1]):
        with pytest.raises(InvalidRequest) as caught:
            batch(other)
        assert "--overwrite" in caught.value.hint
        assert read(tmp_path / "out.jsonl") == before
    with pytest.raises(InvalidRequest, match="another max_tokens, min_p"):
        batch(lines, SamplingParams(temperature=0, max_tokens=7, ignore_eos=True, min_p=0.5))
    other, done = batch(lines[::-1], overwrite=True)
    assert ([a["text"] for a in other], done.resumed) == ([a["text"] for a in before[::-1]], 0)


def test_another_model_is_refused(batch, tmp_path):
    batch([{"prompt": "x"}])
    folder = write_tiny_model(tmp_path / "other", rope_theta=5000.0)
    with LLM(str(folder)) as other, pytest.raises(InvalidRequest, match="another model"):
        BatchRun(other, tmp_path / "in.jsonl", tmp_path / "out.jsonl", params=GREEDY).run()


def test_a_file_that_is_no_output_of_ours_is_not_touched(batch, tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("precious\n")
    with pytest.raises(InvalidRequest, match=r"no out\.jsonl\.resume"):
        batch([{"prompt": "x"}])
    assert target.read_text() == "precious\n"
    (tmp_path / "out.jsonl.resume").write_text('{"form": 1}')
    with pytest.raises(InvalidRequest, match="cannot be understood"):
        batch([{"prompt": "x"}])
    assert target.read_text() == "precious\n"


def test_an_output_that_was_shortened_is_refused_and_an_emptied_one_begun_anew(batch, tmp_path):
    lines = [{"prompt": f"line {i}"} for i in range(3)]
    before, _ = batch(lines)
    target = tmp_path / "out.jsonl"
    target.write_bytes(target.read_bytes()[:-5])
    with pytest.raises(InvalidRequest, match="was changed"):
        batch(lines)
    target.unlink()
    again, done = batch(lines)
    assert ([a["text"] for a in again], done.resumed) == ([a["text"] for a in before], 0)


def test_the_input_is_never_the_output(llm, tmp_path):
    write(tmp_path / "x", [{"prompt": "x"}])
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(InvalidRequest, match="is the input"):
        BatchRun(llm, tmp_path / "x", tmp_path / "x", overwrite=True).run()
    assert (tmp_path / "x").read_bytes() == before


def test_two_runs_do_not_write_one_output(llm, tmp_path):
    write(tmp_path / "in", [{"prompt": "x", "params": {"max_tokens": 100}}])
    errors = []

    def second(_):
        if not errors:
            with pytest.raises(LocalLLMError, match="another process") as caught:
                BatchRun(llm, tmp_path / "in", tmp_path / "out", params=GREEDY).run()
            errors.append(caught)

    BatchRun(llm, tmp_path / "in", tmp_path / "out", params=GREEDY, on_progress=second).run()
    assert len(errors) == 1
    assert len(read(tmp_path / "out")) == 1


@pytest.mark.parametrize("target", ["missing/out", "."])
def test_an_output_that_cannot_be_written_is_told(llm, tmp_path, target):
    write(tmp_path / "in", [{"prompt": "x"}])
    with pytest.raises(LocalLLMError, match="cannot write"):
        BatchRun(llm, tmp_path / "in", tmp_path / target).run()


def test_a_disk_that_fills_up_costs_nothing_that_was_saved(llm, tmp_path, monkeypatch):
    lines = [{"prompt": f"line {i}"} for i in range(30)]
    write(tmp_path / "in", lines)
    monkeypatch.setattr("localllm.batch.journal._CHECKPOINT_LINES", 5)
    run = BatchRun(llm, tmp_path / "in", tmp_path / "out", params=GREEDY, max_batch=4)
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr("localllm.batch.journal.os.fsync", fsync)
        with pytest.raises(LocalLLMError, match="No space left"):
            run.run()
    done = BatchRun(llm, tmp_path / "in", tmp_path / "out", params=GREEDY, max_batch=4).run()
    assert (done.resumed, done.lines) == (10, 30)
    assert [a["index"] for a in read(tmp_path / "out")] == list(range(30))


def test_a_cancelled_run_ends_soon_and_is_gone_on_with(llm, tmp_path):
    lines = [{"prompt": f"line {i}", "params": {"max_tokens": 200}} for i in range(12)]
    write(tmp_path / "in", lines)
    run = BatchRun(
        llm,
        tmp_path / "in",
        tmp_path / "out",
        params=GREEDY,
        max_batch=4,
        on_progress=lambda done: done.lines >= 4 and threading.Timer(0, run.cancel).start(),
    )
    done = run.run()
    assert done.interrupted
    assert 4 <= done.lines < 12
    assert len(read(tmp_path / "out")) == done.lines
    rest = BatchRun(llm, tmp_path / "in", tmp_path / "out", params=GREEDY, max_batch=4).run()
    assert (rest.resumed, rest.lines) == (done.lines, 12)
    assert all(answer["finish_reason"] == "length" for answer in read(tmp_path / "out"))


def test_openai_lines_are_answered_in_openais_form(llm, batch):
    said = []
    answers, done = batch(
        [
            chat({"model": "gpt-4o", "messages": HELLO, "max_completion_tokens": 3}, "a"),
            chat({"model": "m", "prompt": "hello", "temperature": 0}, "b", "/v1/completions"),
        ],
        say=said.append,
    )
    assert done.failed == 0
    first, second = answers
    assert first["custom_id"] == "a"
    assert first["error"] is None
    assert first["response"]["status_code"] == 200
    body = first["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert llm.chat(HELLO, GREEDY).text.startswith(body["choices"][0]["message"]["content"])
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 8, "completion_tokens": 3, "total_tokens": 11}
    assert second["response"]["body"]["object"] == "text_completion"
    assert second["response"]["body"]["choices"][0]["text"] == llm.generate("hello", GREEDY).text
    assert len(said) == 1
    assert "gpt-4o" in said[0]


def test_openai_logprobs_name_the_tokens(batch):
    bias = {"65": 100}
    answers, _ = batch(
        [
            chat({"messages": HELLO, "logit_bias": bias, "logprobs": True, "top_logprobs": 2}),
            chat({"messages": HELLO, "logprobs": True}),
            chat({"prompt": "x", "logit_bias": bias, "logprobs": 2}, url="/v1/completions"),
        ]
    )
    choices = [answer["response"]["body"]["choices"][0] for answer in answers]
    content = choices[0]["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"]) for entry in content] == [("b", [98])] * 6  # token 65
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * 6
    assert choices[1]["logprobs"]["content"][0]["top_logprobs"] == []
    assert choices[2]["logprobs"]["tokens"] == ["b"] * 6
    assert choices[2]["logprobs"]["text_offset"] == list(range(6))


def test_openai_fields_that_change_nothing_are_taken(batch):
    body = {
        "messages": HELLO,
        "n": 1,
        "stream": False,
        "user": "me",
        "stop": None,
        "logprobs": False,
    }
    answers, done = batch([chat({**body, "response_format": {"type": "text"}})])
    assert done.failed == 0
    assert answers[0]["response"]["body"]["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (chat({"messages": HELLO, "n": 2}), "'n' is supported as 1 only"),
        (chat({"messages": HELLO, "stream": True}), "'stream' is supported as False only"),
        (chat({"messages": HELLO, "tool_choice": "auto"}), "unknown body field 'tool_choice'"),
        (chat({"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}), "differ"),
        (chat({"messages": HELLO, "logprobs": 3}), "'logprobs' must be true or false"),
        (chat({"messages": HELLO, "top_logprobs": 3}), "needs 'logprobs'"),
        (chat({"messages": HELLO, "logprobs": True, "top_logprobs": 21}), "20 at most"),
        (chat({"messages": HELLO, "temperature": "hot"}), "temperature must be"),
        (chat({"prompt": "x"}), "unknown body field 'prompt'"),
        (chat({}), "no 'messages'"),
        (chat("text"), "'body' must be an object"),
        (chat({"prompt": ["a", "b"]}, url="/v1/completions"), "'prompt' must be"),
        (chat({"input": "x"}, url="/v1/embeddings"), "'url' must be"),
        ({**chat({"messages": HELLO}), "method": "GET"}, "'method' must be POST"),
        ({**chat({"messages": HELLO}), "extra": 1}, "unknown field 'extra'"),
        (chat({"messages": HELLO}, custom_id=None), "'custom_id' must be given"),
    ],
)
def test_what_an_openai_line_may_not_ask_is_refused_by_name(batch, line, message):
    answers, done = batch([line])
    response = answers[0]["response"]
    assert response["status_code"] == 400
    assert message in response["body"]["error"]["message"]
    assert answers[0]["custom_id"] == line["custom_id"]
    assert done.failed == 1


def test_requests_in_flight_are_submitted_and_taken_one_by_one(llm):
    with llm.in_flight() as flight:
        assert flight.finished() == []
        numbers = {flight.submit(prompt, GREEDY): prompt for prompt in ("a", "b")}
        with pytest.raises(InvalidRequest):
            flight.submit("", GREEDY)
        got = dict(flight.finished())
        numbers[flight.submit([1, 2], GREEDY)] = [1, 2]
        while len(flight):
            got.update(flight.finished(within=0))
        assert {n: r.text for n, r in got.items()} == {
            n: llm.generate(prompt, GREEDY).text for n, prompt in numbers.items()
        }
        flight.submit("left running", GREEDY)
    assert llm.generate("a", GREEDY).text == got[0].text
