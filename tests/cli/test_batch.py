"""`localllm batch`: a file in, a file out; whatever breaks it off, the same command goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time

import pytest

from tests.cli.conftest import COMMAND

SEEDED = ("--seed", 7, "--temperature", 1, "--max-tokens", 12, "--ignore-eos", "--max-batch", 8)


def answers(path):
    """The output, but of the receipts only what must not differ from run to run."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    for line in lines:
        receipt = line.get("receipt", {})
        for name in set(receipt) - {"seed", "prompt_tokens", "generated_tokens", "stopped_by"}:
            del receipt[name]
    return lines


def write(path, count):
    path.write_text("".join(json.dumps({"prompt": f"line {i}"}) + "\n" for i in range(count)))


@pytest.fixture
def start(tmp_path, tiny):
    def run(target, *arguments):
        return subprocess.Popen(
            [*COMMAND, *map(str, ["batch", tiny, tmp_path / "in.jsonl", target, *arguments])],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "LOCALLLM_HOME": str(tmp_path / "home")},
        )

    return run


def wait_for_lines(target, least, child):
    """Until so many lines are safe on the disk, or the command has ended."""
    note = target.with_name(f"{target.name}.resume")
    while child.poll() is None:
        if note.exists() and json.loads(note.read_text())["lines"] >= least:
            return
        time.sleep(0.002)


def test_it_answers_a_file_and_says_how_it_went(localllm, tiny, tmp_path):
    write(tmp_path / "in", 3)
    done = localllm("batch", tiny, tmp_path / "in", tmp_path / "out", "--max-tokens", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert f"3 lines in {tmp_path / 'out'}" in done.stderr
    assert "\r" not in done.stderr
    assert [line["index"] for line in answers(tmp_path / "out")] == [0, 1, 2]


def test_failed_lines_are_counted_and_make_the_exit_code(localllm, tiny, tmp_path):
    (tmp_path / "in").write_text('{"prompt": "a"}\nnonsense\n{"prompt": ""}\n')
    for before in ("", "3 of them from before, "):
        done = localllm("batch", tiny, tmp_path / "in", tmp_path / "out", "--max-tokens", 2)
        assert done.returncode == 1
        assert f"3 lines in {tmp_path / 'out'}, {before}2 failed" in done.stderr


def test_another_input_is_refused_and_overwrite_begins_anew(localllm, tiny, tmp_path):
    write(tmp_path / "in", 2)
    run = ("batch", tiny, tmp_path / "in", tmp_path / "out", "--max-tokens", 2)
    assert localllm(*run).returncode == 0
    (tmp_path / "in").write_text('{"prompt": "other"}\n')
    refused = localllm(*run)
    assert refused.returncode == 1
    assert "--overwrite" in refused.stderr
    assert localllm(*run, "--overwrite", "--limit", 1).returncode == 0
    assert len(answers(tmp_path / "out")) == 1


def test_an_input_that_is_no_file_is_bad_usage(localllm, tiny, tmp_path):
    done = localllm("batch", tiny, tmp_path / "missing", tmp_path / "out")
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()


def test_killed_at_any_moment_it_ends_with_the_answers_of_an_unbroken_run(start, tmp_path):
    write(tmp_path / "in.jsonl", 400)
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert start(whole, *SEEDED).wait(120) == 0
    chance, safe = random.Random(1), 0
    for _ in range(3):
        child = start(broken, *SEEDED)
        wait_for_lines(broken, safe + 1, child)
        time.sleep(chance.uniform(0, 0.05))
        child.kill()
        child.communicate()
        safe = json.loads((tmp_path / "broken.jsonl.resume").read_text())["lines"]
    assert 0 < safe < 400
    last = start(broken, *SEEDED)
    said = last.communicate(timeout=120)[1]
    assert last.returncode == 0, said
    assert f"{safe} of them from before" in said
    assert answers(broken) == answers(whole)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_a_file_to_go_on_with_and_says_so(start, tmp_path):
    write(tmp_path / "in.jsonl", 500)
    target = tmp_path / "out.jsonl"
    child = start(target, *SEEDED)
    wait_for_lines(target, 1, child)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 130, said
    assert "interrupted" in said
    assert "goes on from there" in said
    assert "Traceback" not in said
    done = len(answers(target))
    assert 0 < done < 500
    again = start(target, *SEEDED, "--limit", done + 5)
    assert f"{done} of them from before" in again.communicate(timeout=60)[1]
    assert [line["index"] for line in answers(target)] == list(range(done + 5))
