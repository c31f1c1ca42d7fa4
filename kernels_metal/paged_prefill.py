"""Causal attention of chunks of rows over a paged KV pool that holds their prefixes and themselves.

After FlashAttention-2 (Dao, 2023): tiles of rows, one pass over the positions, online softmax.
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
from localllm.kernels_metal.paged_contests import TOLERANCE, Shape, mlx_attention, prefill_shapes
from localllm.kernels_metal.paged_pool import (
    QUERIES_AND_POOLS,
    Pool,
    bits_of,
    check_array,
    check_call,
    no_sinks,
    pool_inputs,
    pool_shape,
    score_settings,
    shared_heads,
    window_setting,
)
from localllm.kernels_metal.reference import paged_prefill as reference

_STAGED_BYTES = 16 * 1024  # of queries in a threadgroup: half of what it may have
_PREFILL = MetalKernel(
    "paged_prefill",
    (*QUERIES_AND_POOLS, "tables", "tiles", "row_offsets", "starts", "window", "settings", "sinks"),
    ["out"],
)


def tile_columns(head_dim: int, itemsize: int) -> tuple[int, int]:
    """Simdgroups of a threadgroup, and 8-column tiles of each; a column is one head of one row.

    itemsize: bytes of T.
    """
    tiles = 2 if head_dim <= 128 else 1  # what a lane's registers hold of the output
    simdgroups = 8
    while simdgroups * tiles * 8 * head_dim * itemsize > _STAGED_BYTES and simdgroups > 1:
        simdgroups //= 2
    return simdgroups, tiles


def tile_table(row_offsets: NDArray[np.int32], rows: int) -> NDArray[np.int32]:
    """(chunk, first row) of each tile of at most `rows` rows, int32 [tiles, 2]."""
    tiles = [
        (chunk, first)
        for chunk in range(len(row_offsets) - 1)
        for first in range(int(row_offsets[chunk]), int(row_offsets[chunk + 1]), rows)
    ]
    return np.array(tiles, dtype=np.int32).reshape(-1, 2)


def paged_prefill(
    q: mx.array,
    keys: Pool,
    values: Pool,
    tables: mx.array,
    row_offsets: NDArray[np.int32],
    starts: NDArray[np.int32],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Each row's attention over its sequence up to and with itself, in T [rows, heads, head_dim].

    q: T [rows, heads, head_dim]: the rows of several chunks, end to end; chunk c has the rows
    row_offsets[c] ... row_offsets[c + 1] - 1 (int32 [chunks + 1]), the first of them at position
    starts[c] (int32 [chunks]) of its sequence, whose block ids are in tables[c] (int32 [chunks,
    max_blocks]). The chunk's own keys and values are in the pools already. The rest is as for
    `paged_decode`.

    Sums are in float32. A row's bits depend neither on other chunks nor on where its own begins.
    """
    check_call(q, keys, values, sinks)
    rows, heads, head_dim = q.shape
    _, kv_heads, block_size = pool_shape(keys)
    chunks = len(starts)
    check_array(tables, (chunks, tables.shape[1]), mx.int32)
    assert row_offsets.shape == (chunks + 1,), row_offsets
    assert row_offsets[-1] == rows > 0, row_offsets
    simdgroups, tiles = tile_columns(head_dim, q.dtype.size)
    shared = shared_heads(heads, kv_heads, most=simdgroups * tiles * 8)
    table = tile_table(row_offsets, simdgroups * tiles * 8 // shared.share)
    (out,) = _PREFILL(
        Launch(
            inputs=[
                q,
                *pool_inputs(keys),
                *pool_inputs(values),
                tables,
                mx.array(table),
                mx.array(row_offsets, dtype=mx.int32),
                mx.array(starts, dtype=mx.int32),
                window_setting(window),
                score_settings(scale, softcap),
                no_sinks(heads) if sinks is None else sinks,
            ],
            template=[
                ("T", q.dtype),
                ("D", head_dim),
                ("BITS", bits_of(keys)),
                ("BLOCK", block_size),
                ("GROUP", shared.group),
                ("SHARE", shared.share),
                ("SIMDGROUPS", simdgroups),
                ("HT", tiles),
            ],
            grid=(len(table) * shared.parts * 32 * simdgroups, kv_heads, 1),
            threadgroup=(32 * simdgroups, 1, 1),
            output_shapes=[q.shape],
            output_dtypes=[q.dtype],
        )
    )
    return out


def contests(dtype: mx.Dtype) -> Iterator[Contest]:
    """Chunks of prompts through layers of known models, with and without a cached prefix."""
    for shape in prefill_shapes():
        yield contest(shape, dtype)


def contest(shape: Shape, dtype: mx.Dtype) -> Contest:
    @lru_cache(maxsize=1)
    def work() -> tuple[mx.array, PagedKV, dict[str, Any]]:
        kv, q = shape.kv(dtype), shape.queries(dtype)
        call: dict[str, Any] = {
            "q": q,
            "keys": kv.keys,
            "values": kv.values,
            "tables": mx.array(kv.tables),
            "row_offsets": np.arange(0, q.shape[0] + 1, shape.rows, dtype=np.int32),
            "starts": np.array(shape.starts, np.int32),
            "scale": shape.head_dim**-0.5,
            "window": shape.window,
            "softcap": shape.softcap,
            "sinks": shape.sink_logits(),
        }
        return q, kv, call

    return Contest(
        kernel="paged_prefill",
        work=shape.work(dtype),
        ours=lambda: [paged_prefill(**work()[2])],
        mlx=(lambda: [mlx_attention(shape, *work()[:2])]) if shape.in_mlx else None,
        truth=lambda: [reference.paged_prefill(**work()[2])],
        tolerance=TOLERANCE[dtype],
        least_bytes=shape.least_bytes(dtype),
    )
