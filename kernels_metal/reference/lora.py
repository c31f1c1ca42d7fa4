"""The low-rank part of a linear layer, in numpy float64."""

from __future__ import annotations

import numpy as np


def lora(
    y: np.ndarray, x: np.ndarray, a: np.ndarray, b: np.ndarray, adapter: np.ndarray
) -> np.ndarray:
    """y [n, N] + x [n, K] A_i^T B_i^T, a [slots, R, K], b [slots, N, R], i = adapter[row] or -1."""
    out = y.astype(np.float64)
    for row, slot in enumerate(adapter):
        if slot >= 0:
            h = a[slot].astype(np.float64) @ x[row].astype(np.float64)
            out[row] += b[slot].astype(np.float64) @ h
    return out
