"""RMSNorm in numpy float64 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, offset: float = 0.0) -> np.ndarray:
    """float64 [n, d] for float64 x [n, d] and weight [d]."""
    mean = np.mean(x * x, axis=-1, keepdims=True)
    normed: np.ndarray = x / np.sqrt(mean + eps) * (weight + offset)
    return normed


def add_rms_norm(
    x: np.ndarray,
    residual: np.ndarray,
    weight: np.ndarray,
    eps: float,
    offset: float = 0.0,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(sum, normed), float64 [n, d] each, with no rounding between."""
    total = residual + x * scale
    return total, rms_norm(total, weight, eps, offset)
