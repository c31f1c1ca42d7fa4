"""Odds-ratio preference optimization (https://arxiv.org/abs/2403.07691): no reference needed.

    l(y) = mean of log p over the answer's tokens,   odds(y) = exp(l) / (1 - exp(l))
    loss = -l(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected))

The paper's equations 3 to 7, beta being its lambda; a step's loss is the mean over its pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from localllm.errors import InvalidRequest
from localllm.train.methods.dpo import sigmoid, softplus
from localllm.train.methods.protocol import MethodRows, Weighted
from localllm.train.methods.rows import Pair, answers, pairs_laid_out

_SURE = -1e-7  # nearer to log 1 than float32 can tell; odds stay finite


class ORPO:
    """beta: the weight of the odds ratio beside the chosen answer's likelihood."""

    name = "orpo"
    preference = True
    needs_log_probs = True
    needs_reference = False

    def __init__(self, *, beta: float = 0.1) -> None:
        if not (math.isfinite(beta) and beta > 0):
            raise InvalidRequest(f"beta must be above 0, not {beta:g}")
        self.beta = beta

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
        assert log_probs is not None, "ORPO weighs by log-probabilities"
        places = answers(batch)
        sizes = np.array([max(1, len(rows)) for rows in places])
        exact = log_probs.astype(np.float64)
        means = np.array([exact[rows].sum() for rows in places]) / sizes
        capped = np.minimum(means, _SURE)
        log_odds = capped - np.log(-np.expm1(capped))
        ratio = log_odds[::2] - log_odds[1::2]
        losses = -means[::2] + self.beta * softplus(-ratio)
        # d log odds / d l = 1 / (1 - exp(l))
        pull = self.beta * np.repeat(sigmoid(-ratio), 2) / -np.expm1(capped)
        each = np.where(np.arange(len(places)) % 2 == 0, 1 + pull, -pull) / (sizes * total)
        weights = np.zeros(len(batch.counted), np.float32)
        for rows, weight in zip(places, each, strict=True):
            weights[rows] = weight
        metrics = {
            "nll/chosen": -means[::2].sum(),
            "log_odds_ratio": ratio.sum(),
            "rewards/chosen": self.beta * means[::2].sum(),
            "rewards/rejected": self.beta * means[1::2].sum(),
            "rewards/margin": self.beta * (means[::2] - means[1::2]).sum(),
            "rewards/accuracy": np.count_nonzero(means[::2] > means[1::2]),
        }
        return Weighted(
            weights,
            float(losses.sum() / total),
            {name: float(value / total) for name, value in metrics.items()},
        )
