"""What the golden losses and gradients are of; shared by the script that makes them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.tiny import random_tensors, random_tokens

GOLDEN = Path(__file__).parent / "golden.json"

# Name -> settings of the method.
PREFERENCES: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.3},
    "dpo-smoothed": {"beta": 0.5, "label_smoothing": 0.2},
    "orpo": {"beta": 0.4},
}


@dataclass(frozen=True)
class Side:
    """An example as methods take it."""

    tokens: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class Pair:
    chosen: Side
    rejected: Side


@dataclass(frozen=True)
class AdapterCase:
    """The same adapter as PEFT's LoraConfig and as ours want it."""

    model: str
    peft: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)


ADAPTERS = {
    "lora": AdapterCase(
        "llama-gqa",
        {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
        {"rank": 4, "alpha": 6.0},
    ),
    "rslora-patterns": AdapterCase(
        "llama-gqa",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"down_proj": 7, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
        {
            "rank": 4,
            "alpha": 6.0,
            "rslora": True,
            "targets": ("q_proj", "v_proj", "down_proj"),
            "rank_pattern": {"down_proj": 7, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 3.0},
        },
    ),
    "dora": AdapterCase(
        "llama-gqa",
        {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": "all-linear"},
        {"rank": 4, "alpha": 6.0, "dora": True},
    ),
    "dora-biases": AdapterCase(
        "qwen2-gqa",
        {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ["q_proj", "k_proj"]},
        {"rank": 3, "alpha": 5.0, "dora": True, "targets": ("attn.q", "attn.k")},
    ),
}


def ragged(case: Any) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, targets and weights of three sequences, some weights being 0."""
    count = len(case.tokens)
    known = np.array(case.tokens, np.int32)
    rng = np.random.default_rng(5)
    parts = []
    for size in (3, count // 2, count):  # rising, as transformers' dynamic RoPE remembers
        tokens, targets = rng.permutation(known)[:size], rng.permutation(known)[:size]
        weights = rng.normal(size=size) * (rng.random(size) < 0.7)
        parts.append((tokens, targets, weights.astype(np.float32)))
    return parts


def pairs_of(case: Any) -> list[Pair]:
    """Two preferences over one prompt each; answers of different lengths."""
    limit = max(case.tokens) + 1
    made = []
    for number, (prompt, good, bad) in enumerate([(4, 5, 3), (2, 2, 6)]):
        start = random_tokens(prompt, limit, seed=10 + number)
        sides = []
        for which, size in enumerate((good, bad)):
            answer = random_tokens(size, limit, seed=20 + 2 * number + which)
            trained = np.array([False] * prompt + [True] * size)
            sides.append(Side(np.array(start + answer, np.int32), trained))
        made.append(Pair(*sides))
    return made


def adapter_values(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A and B of an adapter under way; magnitudes as factors of their start."""
    values = random_tensors(shapes, seed=7)
    return {
        name: 1 + np.float32(0.2) * (value - 1) if "magnitude" in name else value * np.float32(0.3)
        for name, value in values.items()
    }


def directions(shapes: Any) -> dict[str, np.ndarray]:
    """A random direction for every tensor."""
    return {name: value - value.mean() for name, value in random_tensors(shapes, seed=11).items()}


def kinds_of(shapes: Any) -> dict[str, list[str]]:
    """The tensors of a checkpoint by what they are, whatever the layer or expert."""
    kinds: dict[str, list[str]] = {}
    for name in shapes:
        kinds.setdefault(re.sub(r"\.[0-9]+\.", ".*.", name), []).append(name)
    return kinds


def along(shapes: Any, names: list[str]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors, zero but for the directions of these."""
    return {
        name: value if name in names else np.zeros_like(value)
        for name, value in directions(shapes).items()
    }
