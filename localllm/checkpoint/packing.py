"""Codes of 1 to 8 bits packed into a bit stream, and back.

Eight codes of b bits fill exactly b bytes, so one 64-bit word holds them on the way: the lanes
are folded pairwise (8 -> 16 -> 32 -> 64 bits), or unfolded in the reverse order.
"""

from __future__ import annotations

import numpy as np

# Codes handled at a time: the temporaries (8 bytes for 8 codes, a few of them) stay in cache.
_CHUNK = 1 << 18


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., n] -> uint32 [..., n * bits / 32], code c at bits [c * bits, (c+1) * bits).

    Raises `ValueError` for a code that needs more than `bits` bits, or a row that does not end on
    a 32-bit word.
    """
    if codes.dtype != np.uint8 or not 1 <= bits <= 8:
        raise ValueError(f"cannot pack {codes.dtype} codes in {bits} bits")
    count = codes.shape[-1]
    if count * bits % 32:
        raise ValueError(f"{count} codes of {bits} bits do not fill 32-bit words")
    shape = (*codes.shape[:-1], count * bits // 32)
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"a code needs more than {bits} bits")
    flat = np.ascontiguousarray(codes).reshape(-1)
    if bits == 8:
        return flat.view(np.uint32).reshape(shape)
    packed = np.empty((flat.size // 8, bits), np.uint8)
    words = flat.view(np.uint64)
    for start in range(0, len(words), _CHUNK // 8):
        part = words[start : start + _CHUNK // 8]
        packed[start : start + len(part)] = _low_bytes(_fold(part, bits), bits)
    return packed.reshape(-1).view(np.uint32).reshape(shape)


def unpack_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """The reverse of `pack_codes`: uint32 [..., w] -> uint8 [..., w * 32 / bits]."""
    if packed.dtype != np.uint32 or not 1 <= bits <= 8:
        raise ValueError(f"cannot unpack {bits}-bit codes from {packed.dtype}")
    if packed.shape[-1] * 32 % bits:
        raise ValueError(f"{packed.shape[-1]} words do not hold whole {bits}-bit codes")
    shape = (*packed.shape[:-1], packed.shape[-1] * 32 // bits)
    flat = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat.reshape(shape).copy()
    rows = flat.reshape(-1, bits)
    codes = np.empty((len(rows), 8), np.uint8)
    words = codes.reshape(-1).view(np.uint64)
    for start in range(0, len(rows), _CHUNK // 8):
        part = rows[start : start + _CHUNK // 8]
        words[start : start + len(part)] = _unfold(_as_words(part, bits), bits)
    return codes.reshape(shape)


def _lanes(bits: int, width: int) -> np.uint64:
    """A mask of the low `bits` of every other lane that is `width` bits wide."""
    return np.uint64(sum(((1 << bits) - 1) << at for at in range(0, 64, 2 * width)))


def _fold(words: np.ndarray, bits: int) -> np.ndarray:
    for width in (8, 16, 32):
        low = _lanes(bits, width)
        high = words >> np.uint64(width - bits)
        high &= low << np.uint64(bits)
        words = words & low
        words |= high
        bits *= 2
    return words


def _unfold(words: np.ndarray, bits: int) -> np.ndarray:
    for width, held in ((32, bits * 4), (16, bits * 2), (8, bits)):
        low = _lanes(held, width)
        high = words << np.uint64(width - held)
        high &= low << np.uint64(width)
        words = words & low
        words |= high
    return words


def _low_bytes(words: np.ndarray, bits: int) -> np.ndarray:
    """uint64 [n] -> uint8 [n, bits], the bytes that carry the eight codes."""
    return words.view(np.uint8).reshape(-1, 8)[:, :bits]


def _as_words(rows: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, bits] -> uint64 [n], the missing bytes zero."""
    padded = np.zeros((len(rows), 8), np.uint8)
    padded[:, :bits] = rows
    return padded.reshape(-1).view(np.uint64)
