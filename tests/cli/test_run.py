"""`localllm run`: the answer on stdout, everything else on stderr, honest exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from localllm import LLM, SamplingParams
from tests.cli.conftest import COMMAND

GREEDY = ("--temperature", 0, "--max-tokens", 6, "--ignore-eos")


@pytest.fixture(scope="module")
def answer(tiny):
    """What the library says to the same question."""
    with LLM(str(tiny)) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        return llm.chat([{"role": "user", "content": "hello you"}], params)


def test_it_prints_the_librarys_answer(localllm, tiny, answer):
    done = localllm("run", tiny, "hello you", *GREEDY)
    assert (done.returncode, done.stdout) == (0, answer.text + "\n")
    assert "6 new tokens" in done.stderr


def test_words_are_joined_and_stdin_is_a_prompt_too(localllm, tiny, answer):
    for arguments, stdin in [
        (("hello", "you"), ""),
        ((), "hello you\n"),
        (("-",), "hello you"),
        (("hello", "-"), "you\n"),
    ]:
        assert localllm("run", tiny, *arguments, *GREEDY, stdin=stdin).stdout == answer.text + "\n"


def test_json_holds_the_whole_result(localllm, tiny, answer):
    done = localllm("run", tiny, "hello you", *GREEDY, "--json", "--logprobs", 2)
    result = json.loads(done.stdout)
    assert result["text"] == answer.text
    assert result["token_ids"] == list(answer.token_ids)
    assert result["finish_reason"] == "length"
    assert result["receipt"]["prompt_tokens"] == answer.receipt.prompt_tokens
    assert [len(entry["top"]) for entry in result["logprobs"]] == [2] * 6


def test_raw_completes_without_the_template(localllm, tiny):
    raw = json.loads(localllm("run", tiny, "hi", "--raw", *GREEDY, "--json").stdout)
    chat = json.loads(localllm("run", tiny, "hi", *GREEDY, "--json").stdout)
    assert len(raw["prompt_token_ids"]) == 2
    assert len(chat["prompt_token_ids"]) == 5


def test_a_system_message_and_a_template_file_reach_the_prompt(localllm, tiny, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}[{{ m.role[0] }}{{ m.content }}]{% endfor %}")
    done = localllm(
        "run", tiny, "hi", "--system", "be", "--chat-template", template, *GREEDY, "--json"
    )
    assert len(json.loads(done.stdout)["prompt_token_ids"]) == len("[sbe][uhi]")


def test_activations_reach_the_backend(localllm, smollm2):
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=0, ignore_eos=True)
    told = []
    for activations in ("int8", "float32"):
        with LLM(str(smollm2), activations=activations) as llm:
            wanted = [entry.logprob for entry in llm.generate("hi", params).logprobs]
        options = ("--raw", "--activations", activations, "--json", "--logprobs", 0)
        done = localllm("run", smollm2, "hi", *options, *GREEDY)
        told.append([entry["logprob"] for entry in json.loads(done.stdout)["logprobs"]])
        assert told[-1] == wanted
    assert told[0] != told[1]


def test_the_seed_decides_the_answer(localllm, tiny):
    def say(seed: int) -> str:
        return localllm("run", tiny, "hi", "--seed", seed, "--max-tokens", 20).stdout

    assert say(1) == say(1)
    assert say(1) != say(2)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("no-such-model", "hi"), 1, ["no-such-model", "localllm list --catalog"]),
        (("./nowhere.gguf", "hi"), 1, ["nowhere.gguf"]),
        (("TINY", "   "), 2, ["prompt is empty"]),
        (("TINY", "hi", "--temperature", "-1"), 2, ["temperature"]),
        (("TINY", "hi", "--top-p", "7"), 1, ["top_p", "at most 1"]),
        (("TINY", "hi", "--backend", "warp"), 1, ["warp", "reference"]),
        (("TINY", "hi", "--context", "200000"), 1, ["200000", "100000"]),
        (("TINY", "hi", "--activations", "int7"), 1, ["int7", "float32"]),
        (
            ("TINY", "hi", "--backend", "reference", "--activations", "int8"),
            1,
            ["reference", "float32"],
        ),
        (("TINY", "hi", "--raw", "--system", "x"), 2, ["--raw"]),
        (("TINY", "hi", "--logprobs", "2"), 2, ["--json"]),
        (("TINY", "hi", "--chat-template", "/none"), 2, ["/none"]),
        (("TINY", "hi", "--no-such-option"), 2, ["no-such-option"]),
        (("TINY", "x" * 9000), 1, ["9003 tokens", "8192", "--context"]),
    ],
)
def test_mistakes_are_explained_without_a_traceback(localllm, tiny, arguments, code, words):
    arguments = [tiny if a == "TINY" else a for a in arguments]
    done = localllm("run", *arguments)
    assert done.returncode == code
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_stdin_that_is_not_text_is_refused(localllm, tiny):
    done = localllm("run", tiny, stdin=b"\xff\xfe\x00")
    assert done.returncode == 2
    assert "not UTF-8" in done.stderr


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("json_out", [False, True])
def test_ctrl_c_keeps_what_was_said_and_exits_130(tiny, json_out):
    options = ["--max-tokens", "50000", "--context", "60000", "--ignore-eos", "--temperature", "0"]
    process = subprocess.Popen(
        [*COMMAND, "run", str(tiny), "hello", *options, *(["--json"] if json_out else [])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        if json_out:
            _wait_until_busy(process)
            said = b""
        else:
            said = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in errors
    if json_out:
        assert json.loads(rest)["finish_reason"] == "cancelled"
    else:
        assert len(said + rest) > 1
        assert b"[interrupted]" in errors


def _wait_until_busy(process: subprocess.Popen) -> None:
    """Until the interrupt handler is in place: SigCgt in /proc, or a safe while elsewhere."""
    import time

    for _ in range(600):
        time.sleep(0.1)
        try:
            with open(f"/proc/{process.pid}/stat") as file:
                ticks = int(file.read().rsplit(")", 1)[1].split()[11])
        except FileNotFoundError:
            time.sleep(10)
            return
        if ticks > 300:  # seconds of processor time: loading takes less
            return


def test_reasoning_that_the_template_cannot_be_told_is_refused_with_what_it_knows(
    localllm, tiny, tmp_path
):
    done = localllm("run", tiny, "hello", "--reasoning", "low")
    assert done.returncode == 1
    assert "no option for reasoning" in done.stderr
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}{{ enable_thinking }}", "utf-8")
    options = (*GREEDY, "--chat-template", template, "--json")
    told = localllm("run", tiny, "hello", "--reasoning", "off", *options)
    assert json.loads(told.stdout)["prompt_token_ids"]
    assert localllm("run", tiny, "hello", "--reasoning", "on", "--raw").returncode == 2
