"""GGUF's quantized blocks as affine groups, without loss.

Every format here is  weight = scale * (code - zero_point) + bias  over groups of 16 or 32; the
K-quants keep a group's scale as a float16 per block times a small integer. Only the bits are
moved, so that `Affine.to_float32` gives what ggml's dequantization gives, bit for bit.

Source: the block structs of ggml (ggml-common.h) and their dequantize_row functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from localllm.checkpoint import microscaling
from localllm.checkpoint.gguf_types import GGMLType
from localllm.checkpoint.packing import pack_codes
from localllm.checkpoint.tensor import Affine, GroupValues
from localllm.errors import UnsupportedModel

# Bytes of blocks converted at a time: small against any tensor, and at home in the cache.
_CHUNK = 1 << 18


class Groups(NamedTuple):
    """What `n` blocks hold. codes: uint8 [n, block]; scales, biases: float16 [n, S]; the
    multipliers, where a format has them: [n, groups in a block]."""

    codes: np.ndarray
    scales: np.ndarray
    multiplier: np.ndarray | None = None
    biases: np.ndarray | None = None
    bias_multiplier: np.ndarray | None = None


@dataclass(frozen=True)
class BlockFormat:
    """`layout` names the fields of one block in file order."""

    layout: np.dtype
    bits: int
    group: int
    zero_point: int
    split: Callable[[np.ndarray], Groups]


def to_affine(kind: GGMLType, shape: tuple[int, ...], read: Callable[[int, int], bytes]) -> Affine:
    """Converts a whole tensor; `read(offset, size)` gives the tensor's bytes piece by piece."""
    form = FORMATS[kind.name]
    blocks = int(np.prod(shape, dtype=np.int64)) // kind.block
    step = max(1, _CHUNK // kind.nbytes)
    whole: list[np.ndarray | None] = []
    for start in range(0, max(1, blocks), step):
        size = min(step, blocks - start)
        raw = np.frombuffer(read(start * kind.nbytes, size * kind.nbytes), form.layout)
        groups = form.split(raw)
        parts = (pack_codes(groups.codes, form.bits), *groups[1:])
        if not whole:
            whole = [None if p is None else np.empty((blocks, p.shape[1]), p.dtype) for p in parts]
        for target, part in zip(whole, parts, strict=True):
            if target is not None and part is not None:
                target[start : start + size] = part

    # [blocks, per block] -> [..., out, per row]
    per_row = shape[-1] // kind.block
    codes, scales, multiplier, biases, bias_multiplier = (
        None if w is None else w.reshape(*shape[:-1], per_row * w.shape[1]) for w in whole
    )
    assert codes is not None
    assert scales is not None
    return Affine(
        codes,
        form.bits,
        form.group,
        GroupValues(scales, multiplier),
        None if biases is None else GroupValues(biases, bias_multiplier),
        form.zero_point,
    )


def _shifted(packed: np.ndarray, shifts: range, mask: int) -> np.ndarray:
    """uint8 [..., k] -> uint8 [..., len(shifts), k]: one field of every byte after the other."""
    fields = np.empty((*packed.shape[:-1], len(shifts), packed.shape[-1]), np.uint8)
    for index, shift in enumerate(shifts):
        np.right_shift(packed, shift, out=fields[..., index, :])
    fields &= np.uint8(mask)
    return fields


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [n, k] -> uint8 [n, 2k]: all low halves, then all high halves."""
    return _shifted(packed, range(0, 8, 4), 15).reshape(len(packed), -1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """uint8 [n, 4] -> uint8 [n, 32]: bit c at code c's fifth place."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << np.uint8(4)


def _split_q4_0(b: np.ndarray) -> Groups:
    return Groups(_nibbles(b["qs"]), b["d"])


def _split_q4_1(b: np.ndarray) -> Groups:
    return Groups(_nibbles(b["qs"]), b["d"], biases=b["m"])


def _split_q5_0(b: np.ndarray) -> Groups:
    return Groups(_nibbles(b["qs"]) | _fifth_bits(b["qh"]), b["d"])


def _split_q5_1(b: np.ndarray) -> Groups:
    return Groups(_nibbles(b["qs"]) | _fifth_bits(b["qh"]), b["d"], biases=b["m"])


def _split_q8_0(b: np.ndarray) -> Groups:
    return Groups(b["qs"] ^ np.uint8(128), b["d"])  # a signed byte plus 128, modulo 256


def _split_q2_k(b: np.ndarray) -> Groups:
    n = len(b)
    codes = _shifted(b["qs"].reshape(n, 2, 32), range(0, 8, 2), 3).reshape(n, 256)
    return Groups(codes, b["d"], b["scales"] & np.uint8(15), -b["dmin"], b["scales"] >> 4)


def _split_q3_k(b: np.ndarray) -> Groups:
    n = len(b)
    codes = _shifted(b["qs"].reshape(n, 2, 32), range(0, 8, 2), 3).reshape(n, 256)
    codes |= _shifted(b["hmask"], range(8), 1).reshape(n, 256) << np.uint8(2)
    # 16 scales of 6 bits: low nibbles in 8 bytes, the two high bits in 4 more.
    low, high = b["scales"][:, :8], b["scales"][:, 8:]
    scales = _nibbles(low) | _shifted(high, range(0, 8, 2), 3).reshape(n, 16) << np.uint8(4)
    return Groups(codes, b["d"], scales.view(np.int8) - np.int8(32))


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 12] -> the 8 scale and the 8 bias multipliers of Q4_K and Q5_K, 6 bits each."""
    scale, bias, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((scale & 63, (rest & 15) | (scale >> 2 & 48)), axis=-1)
    biases = np.concatenate((bias & 63, (rest >> 4) | (bias >> 2 & 48)), axis=-1)
    return scales, biases


def _split_q4_k(b: np.ndarray) -> Groups:
    n = len(b)
    codes = _shifted(b["qs"].reshape(n, 4, 32), range(0, 8, 4), 15).reshape(n, 256)
    scales, biases = _six_bit_pairs(b["scales"])
    return Groups(codes, b["d"], scales, -b["dmin"], biases)


def _split_q5_k(b: np.ndarray) -> Groups:
    n = len(b)
    codes = _shifted(b["qs"].reshape(n, 4, 32), range(0, 8, 4), 15).reshape(n, 256)
    codes |= _shifted(b["qh"], range(8), 1).reshape(n, 256) << np.uint8(4)
    scales, biases = _six_bit_pairs(b["scales"])
    return Groups(codes, b["d"], scales, -b["dmin"], biases)


def _split_q6_k(b: np.ndarray) -> Groups:
    n = len(b)
    codes = _shifted(b["ql"].reshape(n, 2, 64), range(0, 8, 4), 15).reshape(n, 256)
    high = _shifted(b["qh"].reshape(n, 2, 32), range(0, 8, 2), 3).reshape(n, 256)
    return Groups(codes | high << np.uint8(4), b["d"], b["scales"])


def _split_mxfp4(b: np.ndarray) -> Groups:
    codes = microscaling.e2m1_codes(_nibbles(b["qs"]))
    unused = (codes == microscaling.ZERO_POINT).all(-1, keepdims=True)
    if microscaling.lost(b["e"], unused):
        raise UnsupportedModel("an MXFP4 scale is beyond what float16 holds")
    return Groups(codes, microscaling.e8m0_halves(b["e"], unused))


def _split_nvfp4(b: np.ndarray) -> Groups:
    nibbles = _shifted(b["qs"].reshape(len(b), 4, 8), range(0, 8, 4), 15)  # [n, 4, 2, 8]
    codes = microscaling.e2m1_codes(nibbles.reshape(len(b), 64))
    return Groups(codes, microscaling.ue4m3_halves(b["d"]))


def _layout(*fields: tuple[str, str, int]) -> np.dtype:
    return np.dtype([(name, kind, (count,)) for name, kind, count in fields])


_D, _DMIN, _M = ("d", "<f2", 1), ("dmin", "<f2", 1), ("m", "<f2", 1)

FORMATS: dict[str, BlockFormat] = {
    "Q4_0": BlockFormat(_layout(_D, ("qs", "u1", 16)), 4, 32, 8, _split_q4_0),
    "Q4_1": BlockFormat(_layout(_D, _M, ("qs", "u1", 16)), 4, 32, 0, _split_q4_1),
    "Q5_0": BlockFormat(_layout(_D, ("qh", "u1", 4), ("qs", "u1", 16)), 5, 32, 16, _split_q5_0),
    "Q5_1": BlockFormat(_layout(_D, _M, ("qh", "u1", 4), ("qs", "u1", 16)), 5, 32, 0, _split_q5_1),
    "Q8_0": BlockFormat(_layout(_D, ("qs", "u1", 32)), 8, 32, 128, _split_q8_0),
    "Q2_K": BlockFormat(
        _layout(("scales", "u1", 16), ("qs", "u1", 64), _D, _DMIN), 2, 16, 0, _split_q2_k
    ),
    "Q3_K": BlockFormat(
        _layout(("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), _D),
        3, 16, 4, _split_q3_k,
    ),
    "Q4_K": BlockFormat(
        _layout(_D, _DMIN, ("scales", "u1", 12), ("qs", "u1", 128)), 4, 32, 0, _split_q4_k
    ),
    "Q5_K": BlockFormat(
        _layout(_D, _DMIN, ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)),
        5, 32, 0, _split_q5_k,
    ),
    "Q6_K": BlockFormat(
        _layout(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), _D),
        6, 16, 32, _split_q6_k,
    ),
    "MXFP4": BlockFormat(
        _layout(("e", "u1", 1), ("qs", "u1", 16)),
        microscaling.BITS, 32, microscaling.ZERO_POINT, _split_mxfp4,
    ),
    "NVFP4": BlockFormat(
        _layout(("d", "u1", 4), ("qs", "u1", 32)),
        microscaling.BITS, 16, microscaling.ZERO_POINT, _split_nvfp4,
    ),
}  # fmt: skip
