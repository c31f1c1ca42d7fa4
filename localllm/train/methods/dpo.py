"""Direct preference optimization (https://arxiv.org/abs/2305.18290), the base as reference.

    h = beta * ((log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected)))
    loss = -(1 - s) log sigmoid(h) - s log sigmoid(-h),   s: label smoothing

with log p(answer) the sum over the answer's tokens. At the first step p is the base, so that h is 0
and the loss ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from localllm.errors import InvalidRequest
from localllm.train.methods.protocol import MethodRows, Weighted
from localllm.train.methods.rows import Pair, answers, pairs_laid_out


class DPO:
    """beta: how strongly the base ties. label_smoothing: the chance that a pair is the wrong way.

    The smoothing is that of conservative DPO (https://ericmitchell.ai/cdpo.pdf).
    """

    name = "dpo"
    preference = True
    needs_log_probs = True
    needs_reference = True

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        if not (math.isfinite(beta) and beta > 0):
            raise InvalidRequest(f"beta must be above 0, not {beta:g}")
        if not 0 <= label_smoothing < 0.5:
            raise InvalidRequest(
                f"label smoothing must be at least 0 and below 0.5, not {label_smoothing:g}"
            )
        self.beta, self.label_smoothing = beta, label_smoothing

    def count(self, items: Sequence[Pair]) -> int:
        return len(items)

    def step_rows(self, items: Sequence[Pair], first_row: int = 0) -> MethodRows:
        return pairs_laid_out(items, first_row)

    def weights(
        self,
        batch: MethodRows,
        total: int,
        log_probs: np.ndarray | None = None,
        reference: np.ndarray | None = None,
    ) -> Weighted:
        assert log_probs is not None, "DPO weighs by log-probabilities"
        assert reference is not None, "DPO compares with the base"
        places = answers(batch)
        gain = log_probs.astype(np.float64) - reference.astype(np.float64)
        rewards = self.beta * np.array([gain[rows].sum() for rows in places])
        chosen, rejected = rewards[::2], rewards[1::2]
        margin, smooth = chosen - rejected, self.label_smoothing
        losses = (1 - smooth) * softplus(-margin) + smooth * softplus(margin)
        # Minus d loss / d log p(chosen); of the rejected answer it is the opposite.
        pull = self.beta * ((1 - smooth) * sigmoid(-margin) - smooth * sigmoid(margin)) / total
        weights = np.zeros(len(batch.counted), np.float32)
        for pair, weight in enumerate(pull):
            weights[places[2 * pair]] = weight
            weights[places[2 * pair + 1]] = -weight
        metrics = {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margin": margin.sum(),
            "rewards/accuracy": np.count_nonzero(margin > 0),
        }
        return Weighted(
            weights,
            float(losses.sum() / total),
            {name: float(value / total) for name, value in metrics.items()},
        )


def sigmoid(x: np.ndarray) -> np.ndarray:
    """float64, without overflow."""
    e = np.exp(-np.abs(x))
    share: np.ndarray = np.where(x >= 0, 1, e) / (1 + e)
    return share


def softplus(x: np.ndarray) -> np.ndarray:
    """float64: -log sigmoid(-x)."""
    y: np.ndarray = np.logaddexp(0.0, x)
    return y
