"""The causal convolutions of recurrent layers: each channel by itself, over the last few rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one sequence among those of a step.

    first: the first of them. count: how many. sure: after so many, 1 at least, the state is wanted.
    """

    first: int
    count: int
    sure: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)

    @cached_property
    def array(self) -> mx.array:
        """int32 [3], as kernels take it."""
        return mx.array([self.first, self.count, self.sure], mx.int32)


def delta_by_ops(
    x: mx.array, state: mx.array, taps: mx.array, run: Run
) -> tuple[mx.array, mx.array]:
    """`delta_conv` in MLX's own ops."""
    y, after = _by_ops(x[run.rows].astype(mx.float32), state, taps, run)
    return y * mx.sigmoid(y), after


def short_by_ops(
    x: mx.array, state: mx.array, taps: mx.array, run: Run
) -> tuple[mx.array, mx.array]:
    """`short_conv` in MLX's own ops."""
    before, gate, inner = mx.split(x[run.rows].astype(mx.float32), 3, axis=-1)
    y, after = _by_ops(before * inner, state, taps, run)
    return (gate * y).astype(x.dtype), after


def _by_ops(rows: mx.array, state: mx.array, taps: mx.array, run: Run) -> tuple[mx.array, mx.array]:
    kept = state.shape[0]
    seen = mx.concatenate([state, rows])  # [kept + count, channels]
    y = seen[: run.count] * taps[0]
    for tap in range(1, kept + 1):
        y = y + seen[tap : tap + run.count] * taps[tap]
    if taps.shape[0] > kept + 1:
        y = y + taps[kept + 1]
    return y, mx.contiguous(seen[run.sure : run.sure + kept])
