"""`localllm finetune --method draft-head` as a user types it."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"word {n}" for n in range(30)))
    return path


def flags(prompts, out) -> list[object]:
    return [
        "--method", "draft-head", "--data", prompts, "--out", out, "--draft-tokens", 700,
        "--seq-len", 24, "--draft-inner", 24, "--draft-vocabulary", 128, "--batch-size", 64,
        "--epochs", 1, "--threads", 1,
    ]  # fmt: skip


def test_it_trains_measures_and_says_how_to_use_it(localllm, tiny, prompts, tmp_path) -> None:
    out = tmp_path / "head"
    done = localllm("finetune", "--model", tiny, *flags(prompts, out))
    assert done.returncode == 0, done.stderr
    assert "tokens a step" in done.stdout
    assert "answers the same" in done.stdout
    assert f"--draft-head {out}" in done.stdout
    used = localllm("run", tiny, "hi", "--draft-head", out, "--max-tokens", 8, "--temperature", 0)
    plain = localllm("run", tiny, "hi", "--max-tokens", 8, "--temperature", 0)
    assert used.stdout == plain.stdout
    again = localllm("finetune", "--method", "draft-head", "--out", out, "--resume", "--json")
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout.splitlines()[-1])
    assert result["type"] == "result"
    assert result["measured"]["same"] is True


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--rank", 4), "rank"),
        (("--dry-run",), "dry-run"),
        (("--optimizer", "lion"), "name"),
        (("--batch-size", 0), "batch"),
    ],
)
def test_flags_without_a_meaning_are_refused(
    more, named, localllm, tiny, prompts, tmp_path
) -> None:
    done = localllm("finetune", "--model", tiny, *flags(prompts, tmp_path / "head"), *more)
    assert done.returncode in (1, 2)
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_its_own_flags_need_it(localllm, tiny) -> None:
    done = localllm("finetune", "--model", tiny, "--draft-inner", 4)
    assert done.returncode == 2
    assert "draft-inner" in done.stderr
