"""Attention of single rows over a paged KV pool: split KV, merged by log-sum-exp in a fixed order.

After Flash-Decoding (Dao et al., 2023), with the online softmax of Milakov and Gimelshein (2018).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.kernel import Launch, MetalKernel
from localllm.kernels_metal.paged_cases import PagedKV
from localllm.kernels_metal.paged_contests import TOLERANCE, Shape, decode_shapes, mlx_attention
from localllm.kernels_metal.paged_pool import (
    QUERIES_AND_POOLS,
    Pool,
    bits_of,
    check_array,
    check_call,
    no_sinks,
    pool_inputs,
    pool_shape,
    position_bytes,
    score_settings,
    shared_heads,
    window_setting,
)
from localllm.kernels_metal.reference import paged_decode as reference

_SIMDGROUPS = 8
_UNSPLIT = 2**30
_DECODE = MetalKernel(
    "paged_decode",
    (*QUERIES_AND_POOLS, "tables", "lengths", "groups", "window", "settings", "sinks"),
    ["out"],
)
_COMBINE = MetalKernel(
    "paged_decode_combine", ["partial", "lengths", "window", "sinks", "extent"], ["out"]
)


def split_positions(
    kv_heads: int, group: int, head_dim: int, bits: int, itemsize: int, window: int | None = None
) -> int:
    """Positions in a split: 256, 512 or 1024; all of them under a window of at most 256.

    A threadgroup takes one KV head and one split, so models with few KV heads get short splits, to
    fill a GPU; but not so short that the partial results, written once and read once, exceed 4 % of
    the KV bytes. group: query heads of a KV head. itemsize: bytes of T. It depends on the model
    alone, so a row's result does not depend on its batch.
    """
    if window is not None and window <= 256:
        return _UNSPLIT
    partial = 2 * group * (head_dim + 2) * 4
    per_position = 2 * position_bytes(head_dim, bits, itemsize)
    for positions in (256, 512):
        if kv_heads < positions // 64 and partial <= 0.04 * positions * per_position:
            return positions
    return 1024


@lru_cache(maxsize=256)
def row_groups(runs: tuple[int, ...], most: int) -> NDArray[np.int32]:
    """(first row, rows) of each group of at most `most` rows of one sequence, int32 [groups, 2]."""
    ends = np.cumsum(runs)
    groups = [
        (first, min(most, int(end) - first))
        for end, run in zip(ends, runs, strict=True)
        for first in range(int(end) - run, int(end), most)
    ]
    return np.array(groups, dtype=np.int32)


def paged_decode(
    q: mx.array,
    keys: Pool,
    values: Pool,
    tables: mx.array,
    lengths: mx.array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
    runs: tuple[int, ...] | None = None,
) -> mx.array:
    """softmax(scale q k) v of each row over the KV of its own sequence, in T [n, heads, head_dim].

    q: T [n, heads, head_dim], T float16, bfloat16 or float32, head_dim a multiple of 16 up to 256.
    keys, values: a layer's pools. tables: int32 [n, max_blocks], the block ids of each row's
    sequence. lengths: int32 [n]: row i sees positions 0 ... lengths[i] - 1, at least one; with a
    window only the last `window` of them, and entries of blocks wholly before it are not looked at.
    softcap: scores become softcap * tanh(scores / softcap). sinks: float32 [heads], one more logit
    of each head, in the denominator alone. runs: where several rows in a row are of one sequence
    (verifying drafts), how many they are each time, n in all: such rows share the reads of the KV.

    Sums are in float32. A row's bits depend on nothing else in the batch, nor on max_blocks
    or runs.
    """
    check_call(q, keys, values, sinks)
    n, heads, head_dim = q.shape
    _, kv_heads, block_size = pool_shape(keys)
    check_array(tables, (n, tables.shape[1]), mx.int32)
    check_array(lengths, (n,), mx.int32)
    columns = 16 if head_dim <= 128 else 8  # what a lane's registers hold of the output
    shared = shared_heads(heads, kv_heads, most=columns)
    groups = row_groups((1,) * n if runs is None else runs, columns // shared.share)
    most_rows = int(groups[:, 1].max())
    assert groups[:, 1].sum() == n, (runs, n)
    bits = bits_of(keys)
    split = split_positions(kv_heads, shared.group, head_dim, bits, q.dtype.size, window)
    splits = -(-tables.shape[1] * block_size // split)
    if window is not None:  # it may begin and end within a split
        splits = min(splits, -(-(window + most_rows - 2) // split) + 1)
    window_array = window_setting(window)
    sink_array = no_sinks(heads) if sinks is None else sinks

    direct = splits == 1
    vectors = n * heads * splits
    (out,) = _DECODE(
        Launch(
            inputs=[
                q,
                *pool_inputs(keys),
                *pool_inputs(values),
                tables,
                lengths,
                mx.array(groups),
                window_array,
                score_settings(scale, softcap),
                sink_array,
            ],
            template=[
                ("T", q.dtype),
                ("OUT", q.dtype if direct else mx.float32),
                ("D", head_dim),
                ("BITS", bits),
                ("BLOCK", block_size),
                ("GROUP", shared.group),
                ("SHARE", shared.share),
                ("HT", -(-most_rows * shared.share // 8)),
                ("SPLIT", split),
                ("DIRECT", direct),
            ],
            grid=(len(groups) * shared.parts * 32 * _SIMDGROUPS, kv_heads, splits),
            threadgroup=(32 * _SIMDGROUPS, 1, 1),
            output_shapes=[q.shape if direct else (vectors * (head_dim + 2),)],
            output_dtypes=[q.dtype if direct else mx.float32],
        )
    )
    if direct:
        return out
    threads = min(-(-head_dim // 32) * 32, 128)
    (out,) = _COMBINE(
        Launch(
            inputs=[out, lengths, window_array, sink_array, mx.array([splits], dtype=mx.int32)],
            template=[("T", q.dtype), ("D", head_dim), ("SPLIT", split)],
            grid=(heads * threads, n, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[q.shape],
            output_dtypes=[q.dtype],
        )
    )
    return out


def contests(dtype: mx.Dtype) -> Iterator[Contest]:
    """Decoding with layers of known models, one sequence and eight of different lengths."""
    for shape in decode_shapes():
        yield contest(shape, dtype)


def contest(shape: Shape, dtype: mx.Dtype) -> Contest:
    @lru_cache(maxsize=1)
    def work() -> tuple[mx.array, PagedKV, dict[str, Any]]:
        kv, q = shape.kv(dtype), shape.queries(dtype)
        last = [start + row + 1 for start in shape.starts for row in range(shape.rows)]
        call: dict[str, Any] = {
            "q": q,
            "keys": kv.keys,
            "values": kv.values,
            "tables": mx.array(np.repeat(kv.tables, shape.rows, axis=0)),
            "lengths": mx.array(last, dtype=mx.int32),
            "scale": shape.head_dim**-0.5,
            "window": shape.window,
            "softcap": shape.softcap,
            "sinks": shape.sink_logits(),
        }
        return q, kv, call

    runs = (shape.rows,) * len(shape.starts)
    return Contest(
        kernel="paged_decode",
        work=shape.work(dtype),
        ours=lambda: [paged_decode(**work()[2], runs=runs)],
        mlx=(lambda: [mlx_attention(shape, *work()[:2])]) if shape.in_mlx else None,
        truth=lambda: [reference.paged_decode(**work()[2])],
        tolerance=TOLERANCE[dtype],
        least_bytes=shape.least_bytes(dtype),
    )
