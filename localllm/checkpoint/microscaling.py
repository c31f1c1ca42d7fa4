"""Microscaling formats: blocks of small floats under a shared scale (OCP MX v1.0), and NVFP4.

E2M1 holds 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives: as integers in halves they are the codes
of an affine tensor of 5 bits, without loss. E4M3 has more values than a byte can spread evenly,
so MXFP8 becomes bfloat16, which holds each of them.
"""

from __future__ import annotations

import numpy as np

from localllm.checkpoint.packing import pack_codes
from localllm.checkpoint.tensor import Affine, Dense, GroupValues

BITS, ZERO_POINT = 5, 12
_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int8)
# From a nibble (sign, exponent, mantissa) to a code.
_CODES = np.concatenate((ZERO_POINT + _HALVES, ZERO_POINT - _HALVES)).astype(np.uint8)
_ROWS = 1 << 14  # of groups converted at a time


def e2m1_codes(nibbles: np.ndarray) -> np.ndarray:
    """uint8 [..., n] of 4-bit floats -> uint8 codes; the value is (code - 12) / 2."""
    codes: np.ndarray = _CODES[nibbles]
    return codes


def e8m0_halves(exponents: np.ndarray, unused: np.ndarray) -> np.ndarray:
    """uint8 powers of two -> float16, half of each, which is what scales a code.

    unused: bool, where no code of the group differs from zero, so that the scale does not matter.
    What float16 cannot hold becomes infinite or zero; `lost` tells.
    """
    power = exponents.astype(np.int16) - 128
    with np.errstate(over="ignore", under="ignore"):
        halves: np.ndarray = np.exp2(power.astype(np.float32)).astype(np.float16)
    halves[exponents == 255] = np.nan
    halves[unused] = 0
    return halves


def lost(exponents: np.ndarray, unused: np.ndarray) -> bool:
    """Whether a scale that matters is beyond float16."""
    seen = exponents[~unused]
    return bool(((seen < 104) | ((seen > 143) & (seen < 255))).any())


def mxfp4(blocks: np.ndarray, exponents: np.ndarray) -> Affine:
    """uint8 blocks [..., G, 16], two weights a byte and the first in the low half, with uint8
    exponents [..., G] -> [..., 32 G]. Raises OverflowError for a scale that float16 cannot hold."""
    pairs = blocks.reshape(-1, 16)
    codes = np.empty((len(pairs), 32 * BITS // 32), np.uint32)
    unused: np.ndarray = np.empty(len(pairs), bool)
    for at in range(0, len(pairs), _ROWS):
        part = pairs[at : at + _ROWS]
        nibbles = np.stack((part & 15, part >> 4), axis=-1).reshape(len(part), 32)
        own = e2m1_codes(nibbles)
        unused[at : at + _ROWS] = (own == ZERO_POINT).all(-1)
        codes[at : at + _ROWS] = pack_codes(own, BITS)
    unused = unused.reshape(exponents.shape)
    if lost(exponents, unused):
        raise OverflowError
    lead = exponents.shape[:-1]
    return Affine(
        codes.reshape(*lead, -1),
        BITS,
        32,
        GroupValues(e8m0_halves(exponents, unused)),
        zero_point=ZERO_POINT,
    )


def nvfp4(words: np.ndarray, scales: np.ndarray) -> Affine:
    """MLX's: uint32 words [..., out, n / 8] of 4-bit floats, and uint8 scales in E4M3
    [..., out, n / 16]."""
    raw = words.view(np.uint8)
    nibbles = np.stack((raw & 15, raw >> 4), axis=-1).reshape(*raw.shape[:-1], -1)
    halves = (e4m3(scales) / 2).astype(np.float16)
    return Affine(
        pack_codes(e2m1_codes(nibbles), BITS), BITS, 16, GroupValues(halves), zero_point=ZERO_POINT
    )


def ue4m3_halves(raw: np.ndarray) -> np.ndarray:
    """uint8 scales of GGUF's NVFP4 -> float16, half of each: E4M3 without sign, 0x7F is 0."""
    halves: np.ndarray = _UE4M3_HALVES[raw]
    return halves


def mxfp8(words: np.ndarray, exponents: np.ndarray) -> Dense:
    """MLX's: uint32 words [..., out, n / 4] of E4M3, uint8 exponents [..., out, n / 32]."""
    values = e4m3(words.view(np.uint8))
    power = exponents.astype(np.int32) - 127
    groups = values.reshape(*exponents.shape, 32)
    scaled = np.ldexp(groups, power[..., None]).astype(np.float32)
    scaled[exponents == 255] = np.nan
    bits = scaled.reshape(values.shape).view(np.uint32)
    return Dense((bits >> 16).astype(np.uint16), "bfloat16")


def e4m3(raw: np.ndarray) -> np.ndarray:
    """uint8 -> float32: 4 bits of exponent (bias 7), 3 of mantissa, no infinities."""
    values: np.ndarray = _E4M3[raw]
    return values


def _e4m3_table() -> np.ndarray:
    raw = np.arange(256)
    exponent, mantissa = raw >> 3 & 15, raw & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    value[(raw & 127) == 127] = np.nan
    return np.where(raw >> 7, -value, value).astype(np.float32)


_E4M3 = _e4m3_table()


def _ue4m3_table() -> np.ndarray:
    raw = np.arange(256)
    exponent, mantissa = raw >> 3 & 15, raw & 7
    value = np.where(
        exponent == 0, np.ldexp(mantissa / 8, -6), np.ldexp(1 + mantissa / 8, exponent - 7)
    )
    value[0x7F] = 0
    return (value / 2).astype(np.float16)


_UE4M3_HALVES = _ue4m3_table()
