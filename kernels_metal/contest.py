"""A kernel against MLX's own ops on the same work, with the truth to judge both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Contest:
    """kernel: its name. work: the shape class, such as "4-bit, 1 row, float16"; one entry of the
    table that decides which of the two is used.

    ours, mlx: compute the same lazily; mlx is None where MLX has no way of its own.
    truth: float64 arrays of the same shapes. tolerance: the error allowed, relative to the largest
    value of the truth. least_bytes: what any way must read and write at least.
    """

    kernel: str
    work: str
    ours: Callable[[], list[mx.array]]
    mlx: Callable[[], list[mx.array]] | None
    truth: Callable[[], list[np.ndarray]]
    tolerance: float
    least_bytes: int
