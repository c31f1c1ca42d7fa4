"""Writes tests/golden/sampling.json: what transformers' logits processors keep of random rows.

Run from the root: python -m scripts.goldens.sampling
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[2] / "tests/golden/sampling.json"
VOCAB = 200
FILTERS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 50, "temperature": 0.5},
    {"top_p": 0.1},
    {"top_p": 0.5},
    {"top_p": 0.95, "temperature": 1.7},
    {"min_p": 0.02},
    {"min_p": 0.3, "temperature": 2.0},
    {"typical_p": 0.2},
    {"typical_p": 0.9},
    {"typical_p": 0.6, "temperature": 0.6},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
]
PENALTIES = (0.6, 1.1, 2.5)


def logits_of(seed: int) -> np.ndarray:
    """float32 [VOCAB], as the test draws them too."""
    return (np.random.default_rng(seed).normal(size=VOCAB) * 2.5).astype(np.float32)


def main() -> None:
    import torch
    from transformers.generation import logits_process as original

    classes = {
        "temperature": original.TemperatureLogitsWarper,
        "top_k": original.TopKLogitsWarper,
        "top_p": original.TopPLogitsWarper,
        "min_p": original.MinPLogitsWarper,
        "typical_p": original.TypicalLogitsWarper,
    }
    kept, penalized = [], []
    for seed, wish in enumerate(FILTERS * 3):
        scores = torch.tensor(logits_of(seed))[None].double()
        for name, make in classes.items():
            if name in wish:
                scores = make(wish[name])(None, scores)
        ids = torch.nonzero(scores[0] > -torch.inf)[:, 0].tolist()
        kept.append({"seed": seed, "params": wish, "kept": ids})
    for seed, penalty in enumerate(PENALTIES, start=100):
        prompt = np.random.default_rng(seed).integers(0, VOCAB, 30).tolist()
        scores = torch.tensor(logits_of(seed))[None].double()
        scores = original.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt]), scores)
        best = torch.argsort(scores[0], descending=True)[:20].tolist()
        penalized.append(
            {
                "seed": seed,
                "penalty": penalty,
                "prompt": prompt,
                "best": best,
                "scores": [round(scores[0, i].item(), 6) for i in best],
            }
        )
    golden = {"filters": kept, "repetition": penalized}
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")) + "\n", "utf-8")
    print(f"wrote {GOLDEN}")


if __name__ == "__main__":
    main()
