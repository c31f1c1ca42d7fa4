"""Paged KV pools in numpy: what they hold, and quantizing into them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from localllm.kernels_metal.paged_pool import Pool, QuantizedPool, group_size

Float64 = NDArray[np.float64]


def as_float64(array: mx.array) -> Float64:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def pool_values(pool: Pool) -> Float64:
    """[blocks, kv_heads, block_size, head_dim], dequantized."""
    if not isinstance(pool, QuantizedPool):
        return as_float64(pool)
    words = np.array(pool.codes)
    shifts = np.arange(0, 32, pool.bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts) & np.uint32(2**pool.bits - 1)
    codes = codes.reshape(*words.shape[:-1], -1)  # [blocks, kv_heads, block_size, head_dim]
    group = codes.shape[-1] // pool.scales.shape[-1]
    scales = np.repeat(as_float64(pool.scales), group, axis=-1)
    biases = np.repeat(as_float64(pool.biases), group, axis=-1)
    return scales * codes + biases


def quantized(values: NDArray[np.float32], bits: int, dtype: mx.Dtype) -> QuantizedPool:
    """A pool of [blocks, kv_heads, block_size, head_dim], the range of each group cut evenly."""
    head_dim = values.shape[-1]
    groups = values.reshape(*values.shape[:-1], -1, group_size(head_dim))
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    steps = 2**bits - 1
    scales = np.maximum(high - low, 1e-6) / steps
    codes = np.clip(np.rint((groups - low[..., None]) / scales[..., None]), 0, steps)
    per_word = codes.astype(np.uint32).reshape(*values.shape[:-1], -1, 32 // bits)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = np.bitwise_or.reduce(per_word << shifts, axis=-1)
    return QuantizedPool(
        mx.array(words), mx.array(scales).astype(dtype), mx.array(low).astype(dtype), bits
    )


def sequence(values: Float64, table: NDArray[np.int32], first: int, last: int) -> Float64:
    """[kv_heads, last - first, head_dim]: positions first ... last - 1 of one sequence."""
    block_size = values.shape[2]
    positions = np.arange(first, last)
    blocks = table[positions // block_size]
    return values[blocks, :, positions % block_size].swapaxes(0, 1)


def attention(
    q: Float64,
    keys: Float64,
    values: Float64,
    *,
    scale: float,
    softcap: float | None,
    sinks: Float64 | None,
) -> Float64:
    """One row, q [heads, head_dim], over all of keys, values [kv_heads, m, head_dim]."""
    group = q.shape[0] // keys.shape[0]
    scores = scale * np.einsum("hd,hmd->hm", q, np.repeat(keys, group, axis=0))
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    sink = np.full(q.shape[0], -np.inf) if sinks is None else sinks
    top = np.maximum(scores.max(axis=1), sink)[:, None]
    weights = np.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True) + np.exp(sink[:, None] - top)
    out: Float64 = np.einsum("hm,hmd->hd", weights / total, np.repeat(values, group, axis=0))
    return out
