"""Matrices in affine codes, in numpy float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def dequantized(
    codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group: int
) -> Floats:
    """codes uint32 [N, K * bits / 32], scales and biases [N, K / group] -> float64 [N, K]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = (codes[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)  # [N, words, per word]
    values = values.reshape(len(codes), -1).astype(np.float64)
    scales, biases = (np.repeat(a.astype(np.float64), group, axis=1) for a in (scales, biases))
    weights: Floats = scales * values + biases
    return weights


def activate(x: Floats, activation: str) -> Floats:
    """silu, or the GELU whose Gauss function is approximated by a tanh."""
    if activation == "silu":
        y: Floats = x / (1 + np.exp(-x))
        return y
    if activation == "gelu_tanh":
        gauss: Floats = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
        return 0.5 * x * (1 + gauss)
    raise ValueError(activation)


def matmul(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | float = 0.0,
    residual: np.ndarray | float = 0.0,
) -> Floats:
    """x [M, K] times weight [N, K] transposed, in float64."""
    y: Floats = x.astype(np.float64) @ weight.T + bias + residual
    return y


def gated(
    x: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    activation: str,
    gate_bias: np.ndarray | float = 0.0,
    up_bias: np.ndarray | float = 0.0,
) -> Floats:
    return activate(matmul(x, gate, gate_bias), activation) * matmul(x, up, up_bias)
