"""`localllm finetune` and `localllm runs` as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from localllm.train.tokenizer import train_tokenizer

COMMAND = [sys.executable, "-c", "from localllm.cli import main; main()"]

_NUMBER, _TEXT, _MAYBE = {"type": "number"}, {"type": "string"}, {"type": ["number", "null"]}
_COUNT = {"type": "integer", "minimum": 0}
# What docs/training.md promises of each event.
EVENTS = {
    "data": {"kind": _TEXT, "rows": _COUNT, "train": _COUNT, "valid": _COUNT, "dropped": _COUNT},
    "program": {
        "name": _TEXT,
        "note": {"type": ["string", "null"]},
        "trainable": _COUNT,
        "processes": _COUNT,
    },
    "plan": {
        "items": {"type": "array", "minItems": 4},
        "total_bytes": _COUNT,
        "available_bytes": _COUNT,
        "steps": _COUNT,
    },
    "start": {"run": _TEXT, "folder": _TEXT, "step": _COUNT, "steps": _COUNT},
    "step": {
        "step": _COUNT,
        "steps": _COUNT,
        "epoch": _NUMBER,
        "loss": _NUMBER,
        "lr": _NUMBER,
        "grad_norm": _NUMBER,
        "tokens": _COUNT,
        "trained_tokens": _COUNT,
        "tokens_per_second": _NUMBER,
        "seconds": _NUMBER,
        "memory_bytes": _MAYBE,
    },
    "eval": {"step": _COUNT, "loss": _NUMBER, "best": {"type": "boolean"}, "seconds": _NUMBER},
    "samples": {"step": _COUNT, "answers": {"type": "array", "items": {"type": "object"}}},
    "checkpoint": {"step": _COUNT, "seconds": _NUMBER},
    "warning": {"text": _TEXT},
    "end": {
        "status": {"enum": ["finished", "early-stop", "interrupted", "diverged"]},
        "step": _COUNT,
        "loss": _MAYBE,
        "valid_loss": _MAYBE,
        "best_step": _MAYBE,
        "tokens": _COUNT,
        "seconds": _NUMBER,
        "adapter": {"type": ["string", "null"]},
    },
}


@pytest.fixture
def run(localllm):
    return localllm


@pytest.fixture
def chats(tmp_path) -> Path:
    return write_chats(tmp_path / "chats.jsonl", 12)


def write_chats(path: Path, count: int) -> Path:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"number {n} of {path.stem}?"},
                {"role": "assistant", "content": "one " * (n % 5 + 1)},
            ]
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_train_then_list_show_compare_chat_and_delete(run, tiny, chats, tmp_path):
    valid = write_chats(tmp_path / "valid.jsonl", 3)
    out = tmp_path / "mine"
    done = run(
        "finetune", "--model", tiny, "--data", chats, "--valid", valid, "--out", out,
        "--steps", 6, "--batch-size", 2, "--rank", 2, "--lr", "1e-3", "--seed", 5,
        "--save-every", 3, "--sample-every", 3, "--sample-prompt", "hi", "--sample-tokens", 4,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = done.stdout
    words = ("12 to train, 3 to validate", "runs on the", "largest micro-batch", "6 steps")
    for word in (*words, "step 6/6"):
        assert word in told
    assert "validation loss" in told
    assert "step 3 > hi" in told
    assert f"localllm chat {tiny} --adapter {out}" in told
    answer = run("run", tiny, "hi", "--adapter", out, "--max-tokens", 3)
    assert answer.returncode == 0, answer.stderr
    second = run("finetune", "--model", tiny, "--data", chats, "--steps", 2, "--lr", "2e-3")
    assert second.returncode == 0, second.stderr
    names = json.loads(run("runs", "list", "--json").stdout)
    assert [(r["name"], r["status"]) for r in names] == [
        ("tiny-1", "finished"),
        ("mine", "finished"),
    ]
    shown = run("runs", "show", "mine").stdout
    assert "6 of 6" in shown
    assert "┤" in shown
    assert "> hi" in shown
    compared = run("runs", "compare", "mine", "tiny-1").stdout
    assert "optimizer.lr" in compared
    assert "0.001" in compared
    assert "0.002" in compared
    assert run("runs", "delete", "mine", "--yes").returncode == 0
    assert not out.exists()
    assert "mine" not in run("runs").stdout


def test_json_events_are_as_documented(run, tiny, chats, tmp_path):
    done = run(
        "finetune", "--model", tiny, "--data", chats, "--out", tmp_path / "run",
        "--valid-fraction", 0.25, "--steps", 4, "--save-every", 2, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    for event in events:
        known = EVENTS[event["type"]]
        schema = {"type": "object", "properties": known, "required": [*known, "type"]}
        jsonschema.validate(event, schema)
    assert {event["type"] for event in events} >= {*EVENTS} - {"samples", "warning"}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        event for event in events if event["type"] in ("step", "eval")
    ]


def test_dry_run_and_preview_train_nothing(run, tiny, chats, tmp_path):
    wish = ("finetune", "--model", tiny, "--data", chats)
    done = run(*wish, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "in all" in done.stdout
    shown = run(*wish, "--preview")
    assert shown.returncode == 0, shown.stderr
    assert "<|user|>number 0 of chats?<|end|><|assistant|>⟦one <|end|>⟧" in shown.stdout
    assert not (tmp_path / "home" / "runs").exists()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_then_resume_as_it_says(run, tiny, chats, tmp_path):
    out = tmp_path / "run"
    words = ["finetune", "--model", tiny, "--data", chats, "--out", out, "--steps", 4000]
    process = subprocess.Popen(
        [*COMMAND, *map(str, words), "--json", "--lr", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LOCALLLM_HOME": str(tmp_path / "home")},
    )
    for line in process.stdout:
        if '"step": 3' in line:
            break
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"localllm finetune --resume {out}" in err
    end = json.loads(rest.splitlines()[-1])
    assert end["status"] == "interrupted"
    shown = run("runs", "list", "--json")
    assert json.loads(shown.stdout)[0]["status"] == "interrupted"
    refused = run("finetune", "--resume", out, "--seed", 7)
    assert refused.returncode == 1
    assert "seed was 0 and is 7" in refused.stderr
    chats.write_text(chats.read_text().replace("number 3", "number 33"))
    changed = run("finetune", "--resume", out)
    assert changed.returncode == 1
    assert "the data's content was" in changed.stderr


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([], 2, "--model and --data must be given"),
        (["--model", "{tiny}"], 2, "--data must be given"),
        (["somewhere"], 2, "only --resume takes"),
        (["--resume"], 1, "there is no run yet"),
        (["--resume", "gone"], 1, "there is no run 'gone'"),
        (["--model", "{tiny}", "--data", "{chats}", "--method", "magic"], 1, "no method 'magic'"),
        (["--model", "{tiny}", "--data", "{chats}", "--optimizer", "x"], 1, "no optimizer 'x'"),
        (["--model", "{tiny}", "--data", "{chats}", "--targets", "attn.z"], 1, "attn.q"),
        (["--model", "{tiny}", "--data", "{chats}", "--rank", "0"], 1, "rank must be from 1"),
        (["--model", "{tiny}", "--data", "{chats}", "--seq-len", "200000"], 1, "positions"),
        (["--model", "{tiny}", "--data", "{chats}", "--early-stop", "2"], 1, "needs validation"),
        (["--model", "nowhere:1b", "--data", "{chats}", "--offline"], 1, "nowhere:1b"),
        (["--config", "none.toml"], 1, "none.toml cannot be read"),
    ],
)
def test_mistakes_are_told_in_a_line(run, tiny, chats, words, code, told):
    done = run("finetune", *(word.format(tiny=tiny, chats=chats) for word in words))
    assert done.returncode == code, done.stderr
    # Typer draws a box around bad usage and may break its lines.
    assert told in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("scratch", [False, True])
def test_all_weights_become_a_model_that_runs(run, tiny, chats, tmp_path, scratch):
    out = tmp_path / "run"
    wish = ["finetune", "--model", tiny, "--data", chats, "--steps", 3, "--out", out]
    wish += ["--scratch", tiny / "config.json"] if scratch else ["--full"]
    done = run(*wish, "--lr", "1e-3")
    assert done.returncode == 0, done.stderr
    assert f"localllm chat {out / 'model'}" in done.stdout
    assert run(*wish, "--lr", "1e-3", "--resume").returncode == 0
    answer = run("run", out / "model", "hi", "--max-tokens", 3)
    assert answer.returncode == 0, answer.stderr


def test_a_config_file_and_flags(run, tiny, chats, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        f"model = {json.dumps(str(tiny))}\n[data]\nsource = {json.dumps(str(chats))}\n"
        "[lora]\nrank = 2\n[run]\nsteps = 2\n"
    )
    done = run("finetune", "--config", config, "--rank", 4, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    saved = (tmp_path / "run" / "config.toml").read_text()
    assert "rank = 4" in saved
    assert "steps = 2" in saved


def test_from_a_vocabulary_of_ones_own_to_a_model_for_llama_cpp(run, tiny, chats, tmp_path):
    texts = [json.loads(line)["messages"][0]["content"] for line in chats.read_text().splitlines()]
    train_tokenizer(texts, 300, tmp_path / "vocabulary")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = run(
        "finetune", "--scratch", tiny / "config.json", "--model", tmp_path / "vocabulary",
        "--data", data, "--steps", 60, "--lr", "1e-2", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    exported = run("export", tmp_path / "run" / "model", "--gguf", tmp_path / "mine.gguf")
    assert exported.returncode == 0, exported.stderr
    for model in (tmp_path / "run" / "model", tmp_path / "mine.gguf"):
        answer = run("run", model, "number 7", "--raw", "--temperature", 0, "--max-tokens", 20)
        assert answer.stdout.strip() == "of chats?", answer.stderr
