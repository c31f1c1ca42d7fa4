"""Rotary position embedding: frequencies of every kind, and the cos/sin tables of some rows.

Formulas and the order of float32 roundings are those of `transformers`
(modeling_rope_utils.py), so that a checkpoint behaves as where it was trained. Pure numpy:
every backend takes its angles from here.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from localllm.errors import UnsupportedModel
from localllm.spec.decoder import AttentionSpec, RopeSpec


def frequencies(rope: RopeSpec, length: int) -> tuple[np.ndarray, float]:
    """Angle per position of each rotated pair, and the factor on cos and sin.

    length: positions the sequence spans; matters only for `dynamic` and `longrope`.
    Returns (float32 [dim / 2], factor). Raises UnsupportedModel if the spec lacks a field its
    kind needs.
    """
    return _frequencies(rope, length_class(rope, length))


def length_class(rope: RopeSpec, length: int) -> int:
    """The shortest length with the same frequencies as `length`."""
    if rope.kind == "dynamic":
        return max(length, rope.original_context)
    if rope.kind == "longrope":
        return rope.original_context + (length > rope.original_context)
    return 0


def tables(
    rope: RopeSpec, positions: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each float32 [n, dim / 2], the attention factor included.

    positions: int [n]. lengths: int [n], the length that governs each row's frequencies.
    """
    classes = np.array([length_class(rope, int(length)) for length in lengths])
    angles = np.empty((len(positions), rope.dim // 2), np.float32)
    factor = 1.0
    for key in np.unique(classes):
        inv_freq, factor = _frequencies(rope, int(key))
        rows = classes == key
        angles[rows] = positions[rows, None].astype(np.float32) * inv_freq
    scale = np.float32(factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def query_scales(attn: AttentionSpec, positions: np.ndarray) -> np.ndarray:
    """float32 [n]: what queries at these positions, int [n], are multiplied by."""
    periods = np.floor(positions / attn.query_context)
    return (1 + attn.query_growth * np.log1p(periods)).astype(np.float32)


@lru_cache(maxsize=256)
def _frequencies(rope: RopeSpec, length: int) -> tuple[np.ndarray, float]:
    _check(rope)
    inv_freq, factor = _KINDS[rope.kind](rope, length)
    if rope.attention_factor is not None:
        factor = rope.attention_factor
    inv_freq = inv_freq.astype(np.float32, copy=False)
    inv_freq.setflags(write=False)  # shared by every caller through the cache
    return inv_freq, float(factor)


def _check(rope: RopeSpec) -> None:
    if rope.dim < 2 or rope.dim % 2:
        raise UnsupportedModel(f"RoPE over {rope.dim} entries: an even number is needed")
    if rope.kind in ("dynamic", "llama3", "yarn", "longrope") and rope.original_context < 1:
        raise UnsupportedModel(f"{rope.kind} RoPE without its original context length")
    if rope.kind == "proportional" and not (rope.rotated % 2 == 0 < rope.rotated <= rope.dim):
        raise UnsupportedModel(f"proportional RoPE that turns {rope.rotated} of {rope.dim} entries")
    if rope.kind == "longrope":
        for name, factors in (("short", rope.short_factor), ("long", rope.long_factor)):
            if len(factors) != rope.dim // 2:
                raise UnsupportedModel(
                    f"longrope has {len(factors)} {name} factors for {rope.dim // 2} frequencies"
                )


def _powers(rope: RopeSpec, base: float) -> np.ndarray:
    """base ** (0, 2/dim, 4/dim, …): float32 exponents, the power rounded once to float32."""
    exponents = np.arange(0, rope.dim, 2).astype(np.float32) / np.float32(rope.dim)
    return np.power(np.float64(np.float32(base)), exponents.astype(np.float64)).astype(np.float32)


def _default(rope: RopeSpec, length: int) -> tuple[np.ndarray, float]:
    return np.float32(1.0) / _powers(rope, rope.theta), 1.0


def _linear(rope: RopeSpec, length: int) -> tuple[np.ndarray, float]:
    return _default(rope, length)[0] / np.float32(rope.factor), 1.0


def _dynamic(rope: RopeSpec, length: int) -> tuple[np.ndarray, float]:
    """NTK-aware: the base grows with the length once it exceeds the original context."""
    base = rope.theta
    if length > rope.original_context and rope.dim > 2:  # with one pair the base is unused
        f32 = np.float32
        stretch = f32(rope.factor) * f32(length) / f32(rope.original_context) - f32(rope.factor - 1)
        base = float(f32(rope.theta) * np.power(stretch, f32(rope.dim / (rope.dim - 2))))
    return np.float32(1.0) / _powers(rope, base), 1.0


def _llama3(rope: RopeSpec, length: int) -> tuple[np.ndarray, float]:
    """Low frequencies are slowed by `factor`, high ones kept, those between blended."""
    context, low, high = rope.original_context, rope.low_freq_factor, rope.high_freq_factor
    inv_freq = _default(rope, length)[0]
    wavelength = np.float32(2 * math.pi) / inv_freq
    slowed = np.where(wavelength > context / low, inv_freq / np.float32(rope.factor), inv_freq)
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    one = np.float32(1)
    blended = (one - smooth) * slowed / np.float32(rope.factor) + smooth * slowed
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(between, blended, slowed), 1.0


def _yarn(rope: RopeSpec, length: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv:2309.00071): interpolate slow pairs, keep fast ones, ramp between."""

    def correction_dim(rotations: float) -> float:
        return (
            rope.dim
            * math.log(rope.original_context / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # as transformers: no division by zero
    one = np.float32(1)
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = one - np.clip(ramp, 0, 1)
    powers = _powers(rope, rope.theta)
    slow = one / (np.float32(rope.factor) * powers)
    fast = one / powers

    def mscale(by: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * by * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        factor = mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    else:
        factor = mscale(1.0)
    return slow * (one - keep) + fast * keep, factor


def _longrope(rope: RopeSpec, length: int) -> tuple[np.ndarray, float]:
    """LongRoPE (arXiv:2402.13753): one factor per frequency, another set past the context."""
    factors = rope.long_factor if length > rope.original_context else rope.short_factor
    inv_freq = np.float32(1) / (np.array(factors, np.float32) * _powers(rope, rope.theta))
    if rope.factor <= 1.0:
        return inv_freq, 1.0
    return inv_freq, math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context))


def _proportional(rope: RopeSpec, length: int) -> tuple[np.ndarray, float]:
    """The frequencies of the whole head, of which the slower ones stand still."""
    inv_freq = _linear(rope, length)[0].copy()
    inv_freq[rope.rotated // 2 :] = 0
    return inv_freq, 1.0


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
