"""QK-norm, RoPE and affine quantization of key and value heads, in numpy float64."""

from __future__ import annotations

import numpy as np


def group_size(head_dim: int) -> int:
    """Neighbours in a head that share a scale and a bias."""
    return 32 if head_dim % 32 == 0 else 16


def normed_heads(x: np.ndarray, weight: np.ndarray, eps: float, offset: float) -> np.ndarray:
    """RMSNorm of each head. x: float64 [n, heads, head_dim]; weight: [head_dim]."""
    mean = np.mean(x * x, axis=-1, keepdims=True)
    result: np.ndarray = x / np.sqrt(mean + eps) * (weight + offset)
    return result


def rotated(
    x: np.ndarray, cosines: np.ndarray, sines: np.ndarray, *, interleaved: bool
) -> np.ndarray:
    """The first dim entries of each head rotated in pairs (Su et al. 2021, arXiv:2104.09864).

    x: float64 [n, heads, head_dim]; cosines, sines: [n, dim / 2]. Pairs are (2 i, 2 i + 1) if
    interleaved, else (i, i + dim / 2).
    """
    half = cosines.shape[1]
    cos, sin = cosines[:, None], sines[:, None]  # [n, 1, dim / 2]
    pairs = [slice(0, 2 * half, 2), slice(1, 2 * half, 2)]
    first, second = pairs if interleaved else [slice(0, half), slice(half, 2 * half)]
    result = x.copy()
    result[..., first] = x[..., first] * cos - x[..., second] * sin
    result[..., second] = x[..., second] * cos + x[..., first] * sin
    return result


def quantized(x: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MLX's affine codes: value = scale * code + bias, the end farther from 0 met exactly.

    x: float64 [n, heads, head_dim]. Returns codes (one an entry, [n, heads, head_dim]), scales
    and biases [n, heads, head_dim / group], none of them rounded to a narrower type.
    """
    top = 2**bits - 1
    groups = x.reshape(*x.shape[:2], -1, group)  # [n, heads, head_dim / group, group]
    least, most = groups.min(-1), groups.max(-1)
    negative = np.abs(least) > np.abs(most)
    edge = np.where(negative, least, most)
    scale = np.maximum((most - least) / top, 1e-7) * np.where(negative, 1.0, -1.0)
    steps = np.rint(edge / scale)
    exact = steps != 0
    scale = np.where(exact, edge / np.where(exact, steps, 1.0), scale)
    bias = np.where(exact, edge, 0.0)
    codes = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, top)
    return codes.reshape(x.shape), scale, bias


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes, one an entry, from uint32 words [..., w] that hold 32 / bits each, low bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1)
