"""The gated delta rule (arXiv:2412.06464): each head's state is carried on row by row."""

from __future__ import annotations

import mlx.core as mx

from localllm.kernels_metal.causal_conv import Run

UNIT_EPS = 1e-6  # added to the square of a query's or key's length


def by_ops(
    qkv: mx.array,
    beta: mx.array,
    decay: mx.array,
    rate: mx.array,
    step: mx.array,
    state: mx.array,
    run: Run,
) -> tuple[mx.array, mx.array]:
    """`gated_delta` in MLX's own ops."""
    heads, value_dim, key_dim = state.shape
    key_heads = (qkv.shape[1] - heads * value_dim) // (2 * key_dim)
    q, k, v = mx.split(qkv, [key_heads * key_dim, 2 * key_heads * key_dim], axis=-1)
    q, k = (_unit(part.reshape(run.count, key_heads, 1, key_dim)) for part in (q, k))
    q, k = (mx.repeat(part, heads // key_heads, axis=1) for part in (q * key_dim**-0.5, k))
    v = v.reshape(run.count, heads, value_dim, 1)
    share = mx.sigmoid(beta[run.rows].astype(mx.float32))[..., None, None]  # [n, H, 1, 1]
    slowed = mx.logaddexp(decay[run.rows].astype(mx.float32) + step, mx.array(0.0))  # softplus
    kept = mx.exp(-mx.exp(rate) * slowed)[..., None, None]
    outputs, after = [], state
    for row in range(run.count):
        state = state * kept[row]
        change = share[row] * (v[row] - mx.sum(state * k[row], axis=-1, keepdims=True))
        state = state + change * k[row]
        outputs.append(mx.sum(state * q[row], axis=-1).reshape(-1))
        if row + 1 == run.sure:
            after = state
    return mx.stack(outputs), after


def _unit(x: mx.array) -> mx.array:
    """Scaled to length 1 along the last axis."""
    return x * mx.rsqrt(mx.sum(mx.square(x), axis=-1, keepdims=True) + UNIT_EPS)
