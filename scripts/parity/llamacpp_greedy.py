"""Greedy answers against llama.cpp's on the same files.

Both engines continue the same token ids greedily. llama.cpp quantizes activations to 8 bits, so
its logits differ from ours by some tenths; where two tokens are closer than that the answers may
part, and everything after is a different text. A divergence counts as a near-tie when the gap
between the two tokens is at most twice the largest difference seen between the engines' logits
on the steps before.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localllm import LLM
from scripts.parity.peers import node_llama_cpp

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "llamacpp_greedy.json"
TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, there was a little girl who",
    "Water boils at",
    "1, 2, 3, 4, 5, 6,",
    "The three primary colours are",
)
TITLE = "Greedy answers against llama.cpp"
NOTE = (
    "Tokens agreed before the first difference, the gap between the two tokens in our logits "
    "there, and the largest difference between the engines' two best logits on the steps before. "
    "llama.cpp quantizes activations to 8 bits; ours here are float32."
)
HEADER = ("Model", "Prompt", "Agreed", "Gap at the first difference", "Largest logit difference")
MODELS = ("smollm2:135m", "gemma3:270m")


@dataclass(frozen=True)
class Comparison:
    """agreed: tokens before the first difference. gap, noise: logits; gap is None if all agree."""

    model: str
    prompt: str
    agreed: int
    total: int
    noise: float
    gap: float | None

    @property
    def near_tie(self) -> bool:
        return self.gap is None or self.gap <= 2 * self.noise


def run_llamacpp(model: Path, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """llama.cpp's ids and its two largest logits at every step."""
    folder, advice = node_llama_cpp()
    if folder is None:
        raise SystemExit(f"node-llama-cpp is not installed: {advice}")
    job = {"model": str(model), "prompts": [list(p) for p in prompts], "tokens": TOKENS}
    script = Path(__file__).with_suffix(".mjs")
    done = subprocess.run(
        ["node", str(script)], input=json.dumps(job), cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"llama.cpp failed: {done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def compare(llm: LLM, golden: dict[str, Any]) -> Comparison:
    """Our logits on llama.cpp's own answer, up to the first token we would not have chosen."""
    prompt, theirs = golden["prompt_ids"], golden["ids"]
    logits = llm.logits([*prompt, *theirs[:-1]])[len(prompt) - 1 :]
    noise = 0.0
    for step, (row, chosen) in enumerate(zip(logits, theirs, strict=True)):
        ours = int(np.argmax(row))
        noise = max(noise, *(abs(float(row[i]) - value) for i, value in golden["top"][step]))
        if ours != chosen:
            gap = float(row[ours] - row[chosen])
            return Comparison(llm.info.name, golden["prompt"], step, len(theirs), noise, gap)
    return Comparison(llm.info.name, golden["prompt"], len(theirs), len(theirs), noise, None)


def rows() -> list[tuple[str, ...]]:
    """One row for each model and prompt; the table of docs/parity.md."""
    goldens = json.loads(GOLDEN.read_text("utf-8"))
    found = []
    for name, answers in goldens["models"].items():
        with LLM(name, backend="reference") as llm:
            found += [_row(compare(llm, answer)) for answer in answers]
    return found


def _row(c: Comparison) -> tuple[str, ...]:
    gap = "-" if c.gap is None else f"{c.gap:.3f}{'' if c.near_tie else ' (not a near-tie)'}"
    prompt = json.dumps(c.prompt, ensure_ascii=False)
    return c.model, f"`{prompt}`", f"{c.agreed} of {c.total}", gap, f"{c.noise:.3f}"


def make_golden() -> dict[str, Any]:
    """Runs llama.cpp on every model and prompt."""
    models: dict[str, Any] = {}
    system = ""
    for name in MODELS:
        with LLM(name) as llm:
            assert llm.tokenizer is not None
            prompts = [llm.tokenizer.encode(text) for text in PROMPTS]
            path = Path(llm.info.path)
        answer = run_llamacpp(path, prompts)
        system = answer["system"]
        models[name] = [
            {"prompt": text, "prompt_ids": ids, **found}
            for text, ids, found in zip(PROMPTS, prompts, answer["answers"], strict=True)
        ]
    return {"peer": "llama.cpp in node-llama-cpp 3.22.1", "system": system, "models": models}
