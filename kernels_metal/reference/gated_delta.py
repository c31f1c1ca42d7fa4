"""The gated delta rule in numpy float64, as arXiv:2412.06464 writes it."""

from __future__ import annotations

import numpy as np


def gated_delta(
    qkv: np.ndarray,
    beta: np.ndarray,
    decay: np.ndarray,
    rate: np.ndarray,
    step: np.ndarray,
    state: np.ndarray,
    sure: int,
) -> tuple[np.ndarray, np.ndarray]:
    """y [n, heads * value_dim] and S after `sure` rows, [heads, value_dim, key_dim] as `state`.

    qkv: [n, channels], q and k of all key heads, then v of all heads. beta, decay: [n, heads], what
    the gates are made of. rate, step: [heads].
    """
    heads, value_dim, key_dim = state.shape
    keys = (qkv.shape[1] - heads * value_dim) // 2
    repeat = heads * key_dim // keys
    outputs, s, after = [], state, state
    for row, (b, a) in enumerate(zip(beta, decay, strict=True)):
        q, k = (
            np.repeat(_unit(part.reshape(-1, key_dim)), repeat, axis=0)  # [heads, key_dim]
            for part in (qkv[row, :keys], qkv[row, keys : 2 * keys])
        )
        v = qkv[row, 2 * keys :].reshape(heads, value_dim)
        share, kept = 1 / (1 + np.exp(-b)), np.exp(-np.exp(rate) * np.logaddexp(0, a + step))
        s = kept[:, None, None] * s
        change = share[:, None] * (v - np.einsum("hvk,hk->hv", s, k))
        s = s + change[:, :, None] * k[:, None]
        outputs.append(np.einsum("hvk,hk->hv", s, q).reshape(-1) * key_dim**-0.5)
        if row + 1 == sure:
            after = s
    return np.stack(outputs), after


def _unit(x: np.ndarray) -> np.ndarray:
    unit: np.ndarray = x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + 1e-6)
    return unit
