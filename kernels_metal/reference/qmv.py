"""Matrices in affine codes, in numpy float64."""

from __future__ import annotations

import numpy as np


def dequantized(
    codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group: int
) -> np.ndarray:
    """codes uint32 [N, K * bits / 32], scales and biases [N, K / group] -> float64 [N, K]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    values = (codes[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)  # [N, words, per word]
    values = values.reshape(len(codes), -1).astype(np.float64)
    scales, biases = (np.repeat(a.astype(np.float64), group, axis=1) for a in (scales, biases))
    return scales * values + biases


def activate(x: np.ndarray, activation: str) -> np.ndarray:
    """silu, or the GELU whose Gauss function is approximated by a tanh."""
    if activation == "silu":
        return x / (1 + np.exp(-x))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    raise ValueError(activation)


def matmul(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | float = 0.0,
    residual: np.ndarray | float = 0.0,
) -> np.ndarray:
    """x [M, K] times weight [N, K] transposed, in float64."""
    return x.astype(np.float64) @ weight.T + bias + residual


def gated(
    x: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    activation: str,
    gate_bias: np.ndarray | float = 0.0,
    up_bias: np.ndarray | float = 0.0,
) -> np.ndarray:
    return activate(matmul(x, gate, gate_bias), activation) * matmul(x, up, up_bias)
