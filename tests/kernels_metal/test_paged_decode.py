"""Paged attention of single rows, in the emulator, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal.paged_cases import PagedKV, normal, paged_kv
from localllm.kernels_metal.paged_decode import paged_decode, row_groups, split_positions
from localllm.kernels_metal.reference import paged_decode as reference
from tests.examples import some
from tests.kernels_metal.paged import assert_right, bits, emulated, in_every_order


@dataclass(frozen=True)
class Work:
    """Rows of one model's layer. Whatever no row may look at is NaN in the pool, -1 in a table."""

    head_dim: int
    heads: tuple[int, int]  # query heads, KV heads
    block_size: int
    bits: int
    dtype: mx.Dtype
    lengths: tuple[int, ...]
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def build(self) -> tuple[mx.array, PagedKV, dict[str, Any]]:
        rng = np.random.default_rng(self.head_dim + len(self.lengths))
        heads, kv_heads = self.heads
        first = [max(0, n - self.window) if self.window else 0 for n in self.lengths]
        kv = paged_kv(
            rng, self.lengths, kv_heads=kv_heads, head_dim=self.head_dim,
            block_size=self.block_size, bits=self.bits, dtype=self.dtype, seen_from=first,
            spare=float("nan"),
        )  # fmt: skip
        q = normal(rng, (len(self.lengths), heads, self.head_dim), self.dtype)
        options: dict[str, Any] = {"scale": self.head_dim**-0.5, "window": self.window}
        options["softcap"] = self.softcap
        options["sinks"] = normal(rng, (heads,), mx.float32) if self.sinks else None
        return q, kv, options


def arguments(q: mx.array, kv: PagedKV, rows: Sequence[int] | None = None) -> tuple[Any, ...]:
    chosen = list(range(q.shape[0])) if rows is None else list(rows)
    lengths = mx.array(np.array(kv.lengths, np.int32)[chosen])
    return q[mx.array(chosen)], kv.keys, kv.values, mx.array(kv.tables[chosen]), lengths


half, bfloat, single = mx.float16, mx.bfloat16, mx.float32

WORKS = [
    Work(64, (6, 2), 4, 0, half, (1, 37, 300)),
    Work(80, (2, 1), 4, 4, bfloat, (5, 70), window=20, softcap=3.0, sinks=True),
    Work(96, (2, 2), 32, 8, single, (33, 64)),
    Work(128, (8, 2), 32, 0, bfloat, (600, 3), window=300, sinks=True),
    Work(128, (4, 1), 32, 4, half, (65,), sinks=True),
    Work(256, (8, 1), 64, 8, bfloat, (130,), softcap=30.0),
    Work(256, (12, 1), 32, 0, single, (40, 7)),  # more query heads than one pass takes
    Work(32, (20, 1), 4, 8, half, (9, 50), window=17, sinks=True),
    Work(16, (4, 2), 4, 4, single, (3, 21)),
    Work(112, (3, 1), 16, 8, half, (19,)),
]


@pytest.mark.parametrize("work", some(WORKS, 3))
def test_a_row_attends_to_its_own_blocks(work: Work) -> None:
    q, kv, options = work.build()
    args = arguments(q, kv)
    got = in_every_order(lambda: paged_decode(*args, **options))
    assert_right(got, reference.paged_decode(*args, **options))


def reference_value(kv: PagedKV, row: int) -> np.ndarray:
    """float32 [kv_heads, head_dim]: the value at position 0."""
    assert isinstance(kv.values, mx.array)
    return np.array(kv.values.astype(mx.float32))[kv.tables[row, 0], :, 0]


def test_a_row_does_not_depend_on_the_batch_nor_on_the_width_of_the_table() -> None:
    work = Work(64, (6, 2), 4, 0, half, (1, 37, 300, 256))
    q, kv, options = work.build()
    together = emulated(lambda: paged_decode(*arguments(q, kv), **options))
    for row, length in enumerate(work.lengths):
        alone, keys, values, table, lengths = arguments(q, kv, [row])
        narrow = table[:, : -(-length // work.block_size)]  # of one split, but for one row
        got = emulated(lambda: paged_decode(alone, keys, values, narrow, lengths, **options))  # noqa: B023
        assert bits(got[0]) == bits(together[row])


@pytest.mark.parametrize(
    ("heads", "window"),
    [
        ((6, 2), None),
        pytest.param((4, 1), 259, marks=pytest.mark.slow),
        pytest.param((4, 2), 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rows_of_one_sequence_get_the_same_bits_together_as_alone(
    heads: tuple[int, int], window: int | None
) -> None:
    """Across the end of a split, at a window's edge that lies in another, and past one pass."""
    work = Work(32, heads, 4, 0, half, (520, 37), window)
    _, kv, options = work.build()
    lengths = [*range(509, 521), *range(35, 38)]  # 12 rows of the first sequence, 3 of the second
    if window:  # the fixture hides what the last row alone does not see
        kv = paged_kv(
            np.random.default_rng(1), work.lengths, kv_heads=heads[1], head_dim=32, block_size=4,
            bits=0, dtype=half, seen_from=[max(0, n - window) for n in (509, 35)],
            spare=float("nan"),
        )  # fmt: skip
    tables = kv.tables[[0] * 12 + [1] * 3]
    rows = normal(np.random.default_rng(2), (15, heads[0], 32), half)
    args = (rows, kv.keys, kv.values, mx.array(tables), mx.array(np.array(lengths, np.int32)))
    alone = emulated(lambda: paged_decode(*args, **options))
    assert_right(alone, reference.paged_decode(*args, **options))
    together = in_every_order(lambda: paged_decode(*args, runs=(12, 3), **options))
    assert bits(together) == bits(alone)


def test_runs_are_cut_into_groups() -> None:
    assert row_groups((1, 5, 2), 2).tolist() == [[0, 1], [1, 2], [3, 2], [5, 1], [6, 2]]


@pytest.mark.parametrize("length", some([1, 30, 31, 32, 33, 255, 256, 257, 300], 3))
def test_no_window_is_a_window_over_everything(length: int) -> None:
    q, kv, options = Work(64, (6, 2), 4, 0, half, (length,)).build()
    args = arguments(q, kv)
    everything = emulated(lambda: paged_decode(*args, **options))
    options["window"] = length
    assert bits(emulated(lambda: paged_decode(*args, **options))) == bits(everything)
    options["window"] = max(1, length - 1)
    truth = reference.paged_decode(*args, **options)
    assert_right(emulated(lambda: paged_decode(*args, **options)), truth)


@pytest.mark.parametrize(("scale", "sinks"), [(300.0, True), (300.0, False), (-300.0, False)])
def test_large_scores_neither_overflow_nor_lose_the_largest(scale: float, sinks: bool) -> None:
    q, kv, options = Work(64, (6, 2), 4, 0, single, (1, 37, 300), sinks=sinks).build()
    options["scale"] = scale  # scores up to some 10,000: all weight on one position
    args = arguments(q, kv)
    truth = reference.paged_decode(*args, **options)
    got = np.array(emulated(lambda: paged_decode(*args, **options)))
    # A score of 2^13 has steps of 2^-10 in float32: so far can the weight of a near rival be off.
    assert np.max(np.abs(got - truth)) < 0.02
    if not sinks:  # the first row sees one position: its value, however low the score
        value = reference_value(kv, 0)
        assert np.array_equal(got[0], np.repeat(value, 3, axis=0))


def test_splits_are_short_for_few_heads_and_long_enough_to_outweigh_what_they_write() -> None:
    assert split_positions(1, 4, 256, 0, 2) == 256  # Gemma 3 270M
    assert split_positions(4, 2, 256, 0, 2) == 512  # Gemma 2 2B
    assert split_positions(8, 4, 128, 0, 2) == 1024  # Qwen3 8B
    assert split_positions(1, 16, 64, 4, 2) == 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "pool_bits", "dtype"),
    list(product([16, 32, 48, 64, 80, 96, 128, 160, 192, 256], [0, 4, 8], [half, bfloat, single])),
    ids=str,
)
def test_every_head_size(head_dim: int, pool_bits: int, dtype: mx.Dtype) -> None:
    for heads, window, softcap, sinks in (
        ((2, 2), None, None, True),
        ((5, 1), 45, 5.0, False),
        ((16, 2), None, None, False),
    ):
        work = Work(head_dim, heads, 32, pool_bits, dtype, (1, 64, 277), window, softcap, sinks)
        q, kv, options = work.build()
        args = arguments(q, kv)
        got = in_every_order(lambda: paged_decode(*args, **options))  # noqa: B023
        assert_right(got, reference.paged_decode(*args, **options))
