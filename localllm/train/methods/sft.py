"""Supervised fine-tuning: the mean of -log p over the trained tokens of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localllm.train.methods.protocol import MethodRows, Weighted
from localllm.train.methods.rows import Tokens, lay_out


class SFT:
    """Each trained token counts alike, whichever example or micro-batch it stands in."""

    name = "sft"
    preference = False
    needs_log_probs = False
    needs_reference = False

    def count(self, items: Sequence[Tokens]) -> int:
        return sum(int(np.count_nonzero(example.trained[1:])) for example in items)

    def step_rows(self, items: Sequence[Tokens], first_row: int = 0) -> MethodRows:
        return lay_out(items, first_row)

    def weights(
        self,
        batch: MethodRows,
        total: int,
        log_probs: np.ndarray | None = None,
        reference: np.ndarray | None = None,
    ) -> Weighted:
        weights = batch.counted / np.float32(max(1, total))
        loss = None
        if log_probs is not None:
            loss = -float(log_probs[batch.counted].astype(np.float64).sum()) / max(1, total)
        return Weighted(weights.astype(np.float32), loss)
