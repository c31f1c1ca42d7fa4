"""Weights to affine codes by groups, rounded to the nearest, and the two numbers of each group."""

from __future__ import annotations

import numpy as np

from localllm.checkpoint.tensor import Affine, GroupValues, pack_codes
from localllm.errors import UnsupportedModel


def quantize_like(weights: np.ndarray, bits: int, group: int, wide: np.dtype) -> Affine:
    """float32 [..., in]: each group from its least to its greatest value, in 2 ** bits steps.

    Scales and biases are rounded to `wide` first, so that codes fit them as they are stored.
    """
    grouped = weights.reshape(*weights.shape[:-1], -1, group)
    low, high = grouped.min(axis=-1), grouped.max(axis=-1)
    top = (1 << bits) - 1
    scales = ((high - low) / np.float32(top)).astype(wide)
    biases = low.astype(wide)
    step = scales.astype(np.float32)
    divisor = np.where(step > 0, step, np.float32(1))[..., None]
    codes = np.rint((grouped - biases.astype(np.float32)[..., None]) / divisor)
    packed = pack_codes(np.clip(codes, 0, top).astype(np.uint8).reshape(weights.shape), bits)
    return Affine(packed, bits, group, GroupValues(scales), GroupValues(biases))


def flat(weight: Affine, wide: np.dtype) -> Affine:
    """The same codes with a scale and a bias for each group, as MLX keeps them.

    Raises UnsupportedModel where `wide` does not hold them.
    """
    scales = weight.scales.to_float32()
    biases = -np.float32(weight.zero_point) * scales
    if weight.biases is not None:
        biases = biases + weight.biases.to_float32()
    for values in (scales, biases):
        with np.errstate(over="ignore"):
            kept = values.astype(wide)
        if not np.isfinite(kept).all():
            raise UnsupportedModel(
                "a group's scale is too large for float16", hint="write the model dense"
            )
    return Affine(
        weight.codes,
        weight.bits,
        weight.group,
        GroupValues(scales.astype(wide)),
        GroupValues(biases.astype(wide)),
    )
