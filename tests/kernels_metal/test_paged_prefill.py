"""Paged attention of chunks of rows, in the emulator, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal.paged_cases import PagedKV, normal, paged_kv
from localllm.kernels_metal.paged_prefill import paged_prefill, tile_columns, tile_table
from localllm.kernels_metal.reference import paged_prefill as reference
from tests.examples import some
from tests.kernels_metal.paged import assert_right, bits, emulated, in_every_order


@dataclass(frozen=True)
class Work:
    """Chunks in one layer. Whatever no row may look at is NaN in the pool, -1 in a table."""

    head_dim: int
    heads: tuple[int, int]  # query heads, KV heads
    block_size: int
    bits: int
    dtype: mx.Dtype
    starts: tuple[int, ...]
    rows: tuple[int, ...]  # of each chunk
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def build(self) -> tuple[mx.array, PagedKV, dict[str, Any]]:
        rng = np.random.default_rng(self.head_dim + sum(self.rows))
        heads, kv_heads = self.heads
        lengths = [start + rows for start, rows in zip(self.starts, self.rows, strict=True)]
        first = [max(0, s + 1 - self.window) if self.window else 0 for s in self.starts]
        kv = paged_kv(
            rng, lengths, kv_heads=kv_heads, head_dim=self.head_dim, block_size=self.block_size,
            bits=self.bits, dtype=self.dtype, seen_from=first, spare=float("nan"),
        )  # fmt: skip
        q = normal(rng, (sum(self.rows), heads, self.head_dim), self.dtype)
        options: dict[str, Any] = {"scale": self.head_dim**-0.5, "window": self.window}
        options["softcap"] = self.softcap
        options["sinks"] = normal(rng, (heads,), mx.float32) if self.sinks else None
        return q, kv, options

    def arguments(self, q: mx.array, kv: PagedKV) -> tuple[Any, ...]:
        offsets = np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int32)
        starts = np.array(self.starts, np.int32)
        return q, kv.keys, kv.values, mx.array(kv.tables), offsets, starts


half, bfloat, single = mx.float16, mx.bfloat16, mx.float32

WORKS = [
    Work(64, (6, 2), 4, 0, half, (0, 13, 50), (5, 47, 1)),
    Work(64, (4, 1), 32, 4, bfloat, (70,), (50,), window=33, sinks=True),
    Work(80, (2, 2), 32, 8, half, (40, 0), (3, 21), softcap=4.0),
    Work(96, (3, 1), 16, 0, single, (5,), (30,), window=12),
    Work(128, (4, 2), 32, 0, bfloat, (31, 0), (20, 9), sinks=True),
    Work(128, (2, 1), 32, 4, single, (0,), (66,)),
    Work(256, (4, 1), 64, 8, single, (9,), (11,), softcap=20.0),
    Work(256, (20, 1), 32, 0, half, (60,), (4,), window=40),
    Work(16, (4, 2), 4, 4, bfloat, (3, 0), (21, 2)),
]


@pytest.mark.parametrize("work", some(WORKS, 3))
def test_a_row_attends_to_its_prefix_and_to_itself(work: Work) -> None:
    q, kv, options = work.build()
    args = work.arguments(q, kv)
    got = in_every_order(lambda: paged_prefill(*args, **options))
    assert_right(got, reference.paged_prefill(*args, **options))


@pytest.mark.parametrize("window", [None, 37])
def test_a_row_does_not_depend_on_how_its_prompt_is_chunked(window: int | None) -> None:
    whole = Work(64, (6, 2), 4, 0, half, (0,), (150,), window)
    q, kv, options = whole.build()
    args = whole.arguments(q, kv)
    expected = emulated(lambda: paged_prefill(*args, **options))
    _, keys, values, table, _, _ = args
    for cut in (1, 31, 90):  # both parts as chunks of one call, the later one first
        rows = mx.concatenate([q[cut:], q[:cut]])
        tables = mx.concatenate([table, table])
        offsets, starts = np.array([0, 150 - cut, 150], np.int32), np.array([cut, 0], np.int32)
        got = emulated(
            lambda: paged_prefill(rows, keys, values, tables, offsets, starts, **options)  # noqa: B023
        )
        assert bits(mx.concatenate([got[150 - cut :], got[: 150 - cut]])) == bits(expected)


def test_heads_that_take_several_passes_do_not_depend_on_the_pass() -> None:
    """40 query heads of one KV head take two passes; 20 take one."""
    work = Work(256, (40, 1), 32, 0, half, (60,), (4,))
    q, kv, options = work.build()
    _, *rest = work.arguments(q, kv)
    together = emulated(lambda: paged_prefill(q, *rest, **options))
    apart = [emulated(lambda: paged_prefill(part, *rest, **options)) for part in mx.split(q, 2, 1)]  # noqa: B023
    assert bits(mx.concatenate(apart, axis=1)) == bits(together)


def test_tiles_keep_to_one_chunk() -> None:
    table = tile_table(np.array([0, 5, 5, 12], np.int32), 4)
    assert table.tolist() == [[0, 0], [0, 4], [2, 5], [2, 9]]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_the_queries_of_a_tile_take_half_of_the_threadgroup_memory(
    head_dim: int, itemsize: int
) -> None:
    simdgroups, tiles = tile_columns(head_dim, itemsize)
    assert simdgroups * tiles * 8 * head_dim * itemsize <= 16 * 1024
    assert simdgroups >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "pool_bits", "dtype"),
    list(product([16, 32, 48, 64, 80, 96, 128, 160, 192, 256], [0, 4, 8], [half, bfloat, single])),
    ids=str,
)
def test_every_head_size(head_dim: int, pool_bits: int, dtype: mx.Dtype) -> None:
    for heads, window, softcap, sinks in (
        ((2, 2), None, None, True),
        ((5, 1), 21, 5.0, False),
        ((16, 2), None, None, False),
    ):
        work = Work(head_dim, heads, 32, pool_bits, dtype, (0, 45), (18, 5), window, softcap, sinks)
        q, kv, options = work.build()
        args = work.arguments(q, kv)
        got = in_every_order(lambda: paged_prefill(*args, **options))  # noqa: B023
        assert_right(got, reference.paged_prefill(*args, **options))
