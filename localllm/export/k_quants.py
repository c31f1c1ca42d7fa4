"""Q4_K and Q6_K, which the gguf library reads and does not write.

Blocks of 256 values in groups, whose scales are small integers times one float16 a block. Scales
are searched for the least squared error, as ggml does without an importance matrix.

Source: the block structs of ggml (ggml-common.h), read in `localllm.checkpoint.gguf_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from localllm.checkpoint.gguf_blocks import FORMATS

BLOCK = 256
# What rows that no such block divides become, as llama.cpp's own converter has it.
INSTEAD = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
_CHUNK = 1 << 10  # blocks at a time
_TRIED = np.linspace(-1, 1, 11)  # steps of the search, in codes more or fewer than the range takes


def quantize(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 [..., n * 256] -> uint8 [..., n * bytes of a block]. kind: "Q4_K" or "Q6_K"."""
    rows = values.reshape(-1, BLOCK)
    layout, encode = FORMATS[kind].layout, _ENCODERS[kind]
    blocks = np.empty(len(rows), layout)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        encode(rows[part].astype(np.float32), blocks[part])
    return blocks.view(np.uint8).reshape(*values.shape[:-1], -1)


def _encode_q4_k(x: np.ndarray, blocks: np.ndarray) -> None:
    """x ~ d * scale * code - dmin * min: 8 groups, codes of 4 bits, scales and mins of 6."""
    groups = x.reshape(len(x), 8, 32)
    scale, low = _affine(groups, 15)
    d, scales = _shared(scale, 63)
    dmin, lows = _shared(low, 63)
    step, offset = d[:, None] * scales, dmin[:, None] * lows
    codes = _rounded((groups + offset[..., None]) * _inverse(step)[..., None], 0, 15)
    blocks["d"], blocks["dmin"] = d[:, None], dmin[:, None]
    first, last, mins, rest = scales[:, :4], scales[:, 4:], lows[:, :4], lows[:, 4:]
    high = (last >> 4 << 6, rest >> 4 << 6)
    blocks["scales"] = np.concatenate(
        (first | high[0], mins | high[1], (last & 15) | (rest & 15) << 4), axis=1
    )
    pairs = codes.reshape(len(x), 4, 2, 32)
    blocks["qs"] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(x), 128)


def _encode_q6_k(x: np.ndarray, blocks: np.ndarray) -> None:
    """x ~ d * scale * (code - 32): 16 groups, codes of 6 bits, scales of 8."""
    groups = x.reshape(len(x), 16, 16)
    scale = _symmetric(groups, 32)
    most = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)[:, 0]
    d = (most / -128).astype(np.float16)
    scales = np.clip(np.rint(scale * _inverse(d)[:, None]), -128, 127).astype(np.int8)
    step = d.astype(np.float32)[:, None] * scales
    codes = (np.clip(np.rint(groups * _inverse(step)[..., None]), -32, 31) + 32).astype(np.uint8)
    blocks["d"], blocks["scales"] = d[:, None], scales
    quarters = codes.reshape(len(x), 2, 4, 32)
    low, high = quarters & 15, quarters >> 4
    halves = low.reshape(len(x), 2, 2, 64)
    blocks["ql"] = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(x), 128)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    blocks["qh"] = np.bitwise_or.reduce(high << shifts, axis=2).reshape(len(x), 64)


_ENCODERS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "Q4_K": _encode_q4_k,
    "Q6_K": _encode_q6_k,
}


def _affine(groups: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and m, neither below 0, of each group's x ~ scale * code - m with codes 0 … top.

    For codes of several widths, the best scale and m are those of a line through (code, x).
    """
    least = np.minimum(groups.min(-1), 0)
    span = groups.max(-1) - least
    best_scale, best_low = span / top, -least
    best = _error(groups, best_scale, best_low, top)
    mean = groups.mean(-1)
    for more in _TRIED:
        inverse = _inverse(span / (top + more))
        codes = np.clip(np.rint((groups - least[..., None]) * inverse[..., None]), 0, top)
        centre = codes.mean(-1)
        spread = np.square(codes - centre[..., None]).sum(-1)
        scale = ((codes - centre[..., None]) * groups).sum(-1) * _inverse(spread)
        low = scale * centre - mean
        below = low < 0  # the line must pass through 0 then
        through = (codes * groups).sum(-1) * _inverse(np.square(codes).sum(-1))
        scale, low = np.where(below, through, scale), np.where(below, 0, low)
        error = np.where(scale > 0, _error(groups, scale, low, top), np.inf)
        better = error < best
        best = np.where(better, error, best)
        best_scale = np.where(better, scale, best_scale)
        best_low = np.where(better, low, best_low)
    return best_scale, best_low


def _error(groups: np.ndarray, scale: np.ndarray, low: np.ndarray, top: int) -> np.ndarray:
    shifted = groups + low[..., None]
    codes = np.clip(np.rint(shifted * _inverse(scale)[..., None]), 0, top)
    error: np.ndarray = np.square(shifted - codes * scale[..., None]).sum(-1)
    return error


def _symmetric(groups: np.ndarray, half: int) -> np.ndarray:
    """The scale of each group's x ~ scale * code with codes -half … half - 1."""
    at = np.abs(groups).argmax(-1)[..., None]
    most = np.take_along_axis(groups, at, -1)[..., 0]
    best, best_scale = np.full(most.shape, np.inf), most / -half
    for more in _TRIED:
        inverse = _inverse(most / -(half + more))
        codes = np.clip(np.rint(groups * inverse[..., None]), -half, half - 1)
        scale = (codes * groups).sum(-1) * _inverse(np.square(codes).sum(-1))
        error = np.square(groups - codes * scale[..., None]).sum(-1)
        better = error < best
        best, best_scale = np.where(better, error, best), np.where(better, scale, best_scale)
    return best_scale


def _shared(values: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [blocks, groups], none below 0, as a float16 a block times codes 0 … top."""
    shared = (values.max(1) / top).astype(np.float16)
    return shared.astype(np.float32), _rounded(values * _inverse(shared)[:, None], 0, top)


def _rounded(values: np.ndarray, low: int, high: int) -> np.ndarray:
    codes: np.ndarray = np.clip(np.rint(values), low, high).astype(np.uint8)
    return codes


def _inverse(values: np.ndarray) -> np.ndarray:
    """1 / x in float32, and 0 for 0."""
    wide = values.astype(np.float32)
    inverse: np.ndarray = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
    return inverse
