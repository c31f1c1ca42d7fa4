"""Attention of the reference backend: causal, windowed, grouped heads, in plain MLX ops."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from localllm.backend.reference_decoder import softcap
from localllm.spec import AttentionSpec


def attention(
    spec: AttentionSpec,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    sinks: mx.array | None = None,
) -> mx.array:
    """float32 [n, heads, head_dim] for q [n, heads, head_dim] over k, v [m, kv_heads, head_dim].

    A row at position p sees the keys at positions p - window + 1 … p (all up to p without a
    window). Positions are absolute, int [n] and [m]. sinks: float32 [heads], where the spec has
    them.
    """
    assert (sinks is not None) == spec.sinks
    n, group = q.shape[0], spec.heads // spec.kv_heads
    # [n, H, hd] -> [KV, group * n, hd]: the heads that share a kv head go in one product.
    q = q.reshape(n, spec.kv_heads, group, spec.head_dim).transpose(1, 2, 0, 3)
    q = q.reshape(spec.kv_heads, group * n, spec.head_dim)
    keys = mx.contiguous(k.transpose(1, 2, 0))  # [KV, hd, m]; MLX's matmul is faster so
    scores = ((q * spec.scale) @ keys).reshape(spec.kv_heads, group, n, -1)
    if spec.softcap is not None:
        scores = softcap(scores, spec.softcap)
    ahead = k_positions[None, :] - q_positions[:, None]  # [n, m]
    seen = ahead <= 0
    if spec.window is not None:
        seen &= ahead > -spec.window
    if not seen.all():
        scores = mx.where(mx.array(seen), scores, -mx.inf)
    if sinks is not None:  # one more key, whose value is nothing
        sink = mx.broadcast_to(sinks.reshape(spec.kv_heads, group, 1, 1), (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, sink], axis=-1)
        weights = mx.softmax(scores, axis=-1)[..., :-1].reshape(spec.kv_heads, group * n, -1)
    else:
        weights = mx.softmax(scores, axis=-1).reshape(spec.kv_heads, group * n, -1)
    out = weights @ mx.contiguous(v.transpose(1, 0, 2))  # [KV, group * n, hd]
    out = out.reshape(spec.kv_heads, group, n, spec.head_dim)
    return out.transpose(2, 0, 1, 3).reshape(n, spec.heads, spec.head_dim)
