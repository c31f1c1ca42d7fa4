"""How far one model's predictions are from another's: Kullback-Leibler divergence by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Logits = Callable[[Sequence[int]], np.ndarray]  # token ids -> float32 [T, V]


@dataclass(frozen=True)
class Divergence:
    """Of the base's prediction from the model's, KL(base || model) in nats.

    same_top: share of positions where both find the same token likeliest.
    """

    tokens: int
    mean: float
    largest: float
    same_top: float


def divergence(base: Logits, model: Logits, sequences: Iterable[Sequence[int]]) -> Divergence:
    """Over every position of the sequences. Both must share a vocabulary."""
    total, largest, same, count = 0.0, 0.0, 0, 0
    for ids in sequences:
        p, q = _log_softmax(base(ids)), _log_softmax(model(ids))
        assert p.shape == q.shape, f"vocabularies of {p.shape[-1]} and {q.shape[-1]}"
        each = (np.exp(p) * (p - q)).sum(axis=-1)
        total += float(each.sum())
        largest = max(largest, float(each.max(initial=0)))
        same += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
        count += len(each)
    if not count:
        return Divergence(0, 0.0, 0.0, 1.0)
    return Divergence(count, total / count, largest, same / count)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, since differences of near-equal predictions are what is asked."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide
