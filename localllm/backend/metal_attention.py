"""Attention over the paged pool in MLX's own ops: blocks gathered, then one fused call.

The kernels do the same without the copy; this is what they are measured against, and what serves
where they lose or do not reach (head sizes that are no multiple of 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from localllm.backend.metal_kv import KvPool, Rows, dequantize
from localllm.spec import AttentionSpec


@dataclass(frozen=True)
class ChunkRows:
    """Consecutive rows of one sequence in a step. offset: their first row in it.

    table: int32 [m], the blocks of positions 0 …; those wholly before the window are not read.
    start: position of the first row. count: rows.
    """

    table: np.ndarray
    start: int
    offset: int
    count: int


def attend(
    spec: AttentionSpec,
    pool: KvPool,
    layer: int,
    chunks: Sequence[ChunkRows],
    q: mx.array,
    sinks: mx.array | None = None,
) -> mx.array:
    """T [rows, heads, head_dim] for the rows of all chunks, q as many."""
    parts = [
        attend_chunk(spec, pool, layer, c.table, c.start, q[c.offset : c.offset + c.count], sinks)
        for c in chunks
    ]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def attend_chunk(
    spec: AttentionSpec,
    pool: KvPool,
    layer: int,
    table: np.ndarray,
    start: int,
    q: mx.array,
    sinks: mx.array | None = None,
) -> mx.array:
    """T [n, heads, head_dim] for rows q at positions start … of one sequence.

    table: int32 [m], the blocks of positions 0 …; those wholly before the window are not read.
    """
    n, size = q.shape[0], pool.block_size
    first = 0 if spec.window is None else max(0, start - spec.window + 1) // size
    last = -(-(start + n) // size)
    blocks = mx.array(table[first:last].astype(np.int32))
    keys, values = (
        _gathered(side.blocks(spec.kv_heads, size), blocks, pool.bits)
        for side in pool.layers[layer]
    )
    # [n, H, hd] -> [1, H, n, hd]
    out = _attention(
        spec,
        q.transpose(1, 0, 2)[None],
        keys[None],
        values[None],
        np.arange(start, start + n),
        np.arange(first * size, last * size),
        sinks,
    )
    return out[0].transpose(1, 0, 2)


def _gathered(side: Rows, blocks: mx.array, bits: int) -> mx.array:
    """[kv_heads, positions, head_dim] of pool arrays [blocks, kv_heads, block_size, …]."""
    parts = tuple(array[blocks] for array in side)
    rows = parts[0] if bits >= 16 else dequantize(parts, bits)
    return rows.transpose(1, 0, 2, 3).reshape(rows.shape[1], -1, rows.shape[-1])


def _attention(
    spec: AttentionSpec,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    sinks: mx.array | None,
) -> mx.array:
    """[1, heads, n, head_dim]; unseen keys may hold anything finite."""
    ahead = k_positions[None, :] - q_positions[:, None]  # [n, m]
    seen = ahead <= 0
    if spec.window is not None:
        seen &= ahead > -spec.window
    mask = None if seen.all() else mx.array(seen)
    if spec.softcap is None:
        logits = None if sinks is None else sinks.astype(q.dtype)
        return mx.fast.scaled_dot_product_attention(
            q, k, v, scale=spec.scale, mask=mask, sinks=logits
        )
    n, group = q.shape[2], spec.heads // spec.kv_heads
    # [1, H, n, hd] -> [KV, group * n, hd]: the heads that share a kv head go in one product.
    rows = q.reshape(spec.kv_heads, group * n, spec.head_dim).astype(mx.float32)
    scores = (rows * spec.scale) @ k[0].astype(mx.float32).swapaxes(-1, -2)
    scores = spec.softcap * mx.tanh(scores / spec.softcap)
    scores = scores.reshape(spec.kv_heads, group, n, -1)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    if sinks is not None:  # one more key, whose value is nothing
        sink = mx.broadcast_to(sinks.reshape(spec.kv_heads, group, 1, 1), (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, sink], axis=-1)
    weights = mx.softmax(scores, axis=-1)[..., : k.shape[2]]
    weights = weights.reshape(spec.kv_heads, group * n, -1)
    out = (weights @ v[0].astype(mx.float32)).astype(q.dtype)
    return out.reshape(1, spec.heads, n, spec.head_dim)
