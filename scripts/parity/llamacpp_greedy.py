"""Greedy answers against llama.cpp's on the same files.

Both engines continue the same token ids greedily. llama.cpp quantizes activations to 8 bits, and
so does our cpu backend, each in its own way; the reference backend stays in float32. So logits
differ by some tenths; where two tokens are closer than that the answers may part, and everything
after is a different text. A divergence counts as a near-tie when the gap between the two tokens is
at most twice the largest difference seen between the engines' logits up to there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localllm import LLM
from scripts.parity.greedy_prompts import PROMPTS
from scripts.parity.llamacpp import LlamaCpp

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "llamacpp_greedy.json"
TOKENS = 24
TITLE = "Greedy answers against llama.cpp"
NOTE = (
    f"{len(PROMPTS)} prompts (`scripts/parity/greedy_prompts.py`), {TOKENS} tokens each. For "
    "every answer that parts: tokens agreed before the first difference, the gap there between "
    "the two tokens in our logits, and the largest difference up to there between the engines' two "
    "best logits. llama.cpp quantizes activations to 8 bits; so does `cpu`, while `reference` "
    "stays in float32. A gap of at most twice the difference is a near-tie."
)
HEADER = ("Model", "Backend", "Prompt", "Agreed", "Gap", "Largest logit difference")
MODELS = ("smollm2:135m", "gemma3:270m")
BACKENDS = ("cpu", "reference")


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


def compare(llm: LLM, golden: dict[str, Any], tokens: int = TOKENS) -> Comparison:
    """Our logits on llama.cpp's own answer, up to the first token we would not have chosen."""
    assert llm.tokenizer is not None
    prompt, theirs = llm.tokenizer.encode(golden["prompt"]), golden["ids"][:tokens]
    logits = llm.logits([*prompt, *theirs[:-1]])[len(prompt) - 1 :]
    noise = 0.0
    for step, (row, chosen) in enumerate(zip(logits, theirs, strict=True)):
        ours = int(np.argmax(row))
        first, second, second_id = golden["top"][step]
        for token, hundredths in ((chosen, first), (second_id, second)):
            noise = max(noise, abs(float(row[token]) - hundredths / 100))
        if ours != chosen:
            gap = float(row[ours] - row[chosen])
            return Comparison(llm.info.name, golden["prompt"], step, len(theirs), noise, gap)
    return Comparison(llm.info.name, golden["prompt"], len(theirs), len(theirs), noise, None)


def rows() -> list[tuple[str, ...]]:
    """For each model and backend one row that counts, then one for each answer that parts."""
    goldens = json.loads(GOLDEN.read_text("utf-8"))
    found = []
    for name, answers in goldens["models"].items():
        for backend in BACKENDS:
            with LLM(name, backend=backend) as llm:
                compared = [compare(llm, answer) for answer in answers]
            found.append(_count(name, backend, compared))
            found += [_row(backend, c) for c in compared if c.gap is not None]
    return found


def _count(model: str, backend: str, compared: Sequence[Comparison]) -> tuple[str, ...]:
    parted = [c for c in compared if c.gap is not None]
    ties = sum(c.near_tie for c in parted)
    said = f"{len(compared) - len(parted)} of {len(compared)} answers the same"
    if parted:
        said += f"; {ties} of {len(parted)} part at a near-tie"
    worst = max((c.gap for c in parted if c.gap is not None), default=0.0)
    noise = max(c.noise for c in compared)
    return model, backend, f"**{said}**", "", f"{worst:.3f} at most", f"{noise:.3f} at most"


def _row(backend: str, c: Comparison) -> tuple[str, ...]:
    assert c.gap is not None
    gap = f"{c.gap:.3f}{'' if c.near_tie else ' (not a near-tie)'}"
    prompt = json.dumps(c.prompt, ensure_ascii=False)
    return c.model, backend, f"`{prompt}`", f"{c.agreed} of {c.total}", gap, f"{c.noise:.3f}"


def make_golden() -> dict[str, Any]:
    """Runs llama.cpp on every model and prompt. Raises PeerMissing."""
    models: dict[str, Any] = {}
    system = ""
    for name in MODELS:
        with LLM(name) as llm:
            assert llm.tokenizer is not None
            prompts = [llm.tokenizer.encode(text) for text in PROMPTS]
            path = Path(llm.info.path)
        with LlamaCpp(path, context=512) as peer:
            system = f"{peer.kernels}: {peer.system}"
            models[name] = [
                {"prompt": text, **answer(peer, ids)}
                for text, ids in zip(PROMPTS, prompts, strict=True)
            ]
    return {"peer": "llama.cpp in node-llama-cpp 3.22.1", "system": system, "models": models}


def answer(peer: LlamaCpp, prompt: Sequence[int]) -> dict[str, Any]:
    """Its greedy ids, and for each step [best logit, second best, second's id], in hundredths."""
    peer.clear()
    ids: list[int] = []
    top: list[list[int]] = []
    logits = peer.decode(prompt, 0)[0]
    while True:
        second, first = np.argsort(logits)[-2:].tolist()
        top.append([round(float(logits[i]) * 100) for i in (first, second)] + [second])
        ids.append(first)
        if len(ids) == TOKENS or peer.is_end(first):
            return {"ids": ids, "top": top}
        logits = peer.decode([first], len(prompt) + len(ids) - 1)[0]
