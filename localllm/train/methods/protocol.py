"""What a training method is: from examples to rows, and from log-probabilities to weights.

A step's loss is differentiated in two passes. Rows go through the model once for their
log-probabilities where the loss is no fixed sum of them; the method's derivative by each becomes
that row's weight; and the program differentiates -sum(weight * log p). The gradient is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from localllm.train.program import Rows


@dataclass(frozen=True)
class MethodRows:
    """counted: bool [n], the rows whose target the method looks at."""

    rows: Rows
    counted: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.counted)

    @property
    def trained(self) -> int:
        return int(np.count_nonzero(self.counted))


@dataclass(frozen=True)
class Weighted:
    """weights: float32 [n], minus the derivative of the step's loss by each log-probability.

    loss: this micro-batch's part of the step's loss; None where the method was given no
        log-probabilities and the program's own sum is the loss. metrics: its part of the step's
        means. Both are to be added up over the step's micro-batches.
    """

    weights: np.ndarray
    loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Method(Protocol):
    """name: as users write it. preference: takes pairs instead of examples.

    needs_log_probs: its weights depend on the model's log-probabilities. needs_reference: and on
    the base model's, the adapter off.
    """

    name: str
    preference: bool
    needs_log_probs: bool
    needs_reference: bool

    def count(self, items: Sequence[Any]) -> int:
        """What the loss is a mean over; a step's is the sum of its micro-batches'."""
        ...

    def step_rows(self, items: Sequence[Any], first_row: int = 0) -> MethodRows:
        """A micro-batch laid end to end; first_row: the rows of the step's ones before it."""
        ...

    def weights(
        self,
        batch: MethodRows,
        total: int,
        log_probs: np.ndarray | None = None,
        reference: np.ndarray | None = None,
    ) -> Weighted:
        """total: `count` of the whole step. log_probs, reference: float32 [n], as needed.

        However a step is cut, the weights of a row are the same.
        """
        ...
