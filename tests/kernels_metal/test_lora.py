"""Rows of one batch with different adapters, each as if it were alone."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal.lora import contests, lora
from localllm.kernels_metal.reference import lora as reference
from tests.kernels_metal.running import (
    DTYPES,
    assert_near,
    bits_of,
    check_contest,
    dtype_id,
    emulated,
    f64,
    in_every_order,
)


class Batch(NamedTuple):
    y: mx.array
    x: mx.array
    a: mx.array
    b: mx.array
    adapter: mx.array

    def rows(self, rows: slice) -> Batch:
        return self._replace(y=self.y[rows], x=self.x[rows], adapter=self.adapter[rows])


def batch(adapter: list[int], slots: int, rank: int, k: int, n: int, dtype: mx.Dtype) -> Batch:
    rng = np.random.default_rng(k + n)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, np.float32)).astype(dtype)

    rows = len(adapter)
    x, a, b = normal(rows, k), normal(slots, rank, k), normal(slots, n, rank)
    return Batch(normal(rows, n), x, a * k**-0.5, b * rank**-0.5, mx.array(adapter, mx.int32))


def check(case: Batch) -> None:
    got = in_every_order(lambda: lora(*case))
    arrays = [f64(array) for array in case[:4]]
    adapter = np.array(case.adapter)
    # float32 sums of K, then of R terms: an error of each, of the sum of the magnitudes.
    _, rank, k = case.a.shape
    error = (k + rank + 2) * 2.0**-24 * reference.lora(*map(np.abs, arrays), adapter)
    assert_near(got, reference.lora(*arrays, adapter), error)


# Ragged: columns that fill no threadgroup, ranks that fill no lanes, arrays of under 8 elements.
SHAPES = [
    ([0, 3, 1, -1, 0], 16, 576, 37),
    ([2], 64, 136, 5),
    ([1, 1, -1, 1, 2, 0, 0, 2, -1], 24, 1048, 130),
    ([0, -1], 8, 8, 1),
    ([0], 136, 24, 3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_each_row_gets_what_its_adapter_adds(dtype):
    adapter, rank, k, n = SHAPES[0]
    check(batch(adapter, 4, rank, k, n, dtype))


@pytest.mark.parametrize(("adapter", "rank", "k", "n"), SHAPES[1:])
def test_any_ranks_and_widths(adapter, rank, k, n):
    check(batch(adapter, 4, rank, k, n, mx.float16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize(("adapter", "rank", "k", "n"), SHAPES[1:])
def test_any_ranks_and_widths_in_other_dtypes(adapter, rank, k, n, dtype):
    check(batch(adapter, 4, rank, k, n, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_row_without_an_adapter_passes_bit_for_bit(dtype):
    case = batch([-1, 0, -1], 4, 16, 576, 12, dtype)
    odd = [0.0, -0.0, mx.inf, -mx.inf, mx.nan, 1e-7]
    case = case._replace(y=mx.array([odd * 2, [0.0] * 12, odd * 2]).astype(dtype))
    got = bits_of(emulated(lambda: lora(*case)))
    np.testing.assert_array_equal(got[[0, 2]], bits_of(case.y)[[0, 2]])


def test_a_row_has_the_same_bits_alone_and_beside_any_others():
    case = batch([0, 3, 1, -1, 0, 2, 3], 4, 16, 576, 37, mx.float16)
    together = bits_of(emulated(lambda: lora(*case)))
    for row in range(7):
        alone = emulated(lambda row=row: lora(*case.rows(slice(row, row + 1))))
        np.testing.assert_array_equal(bits_of(alone)[0], together[row])


def test_zeros_in_the_last_ranks_change_nothing():
    case = batch([1, 0], 2, 8, 64, 9, mx.float16)
    padded = case._replace(
        a=mx.pad(case.a, ((0, 0), (0, 8), (0, 0))), b=mx.pad(case.b, ((0, 0), (0, 0), (0, 8)))
    )
    got, want = emulated(lambda: lora(*padded)), emulated(lambda: lora(*case))
    np.testing.assert_allclose(f64(got), f64(want), rtol=2.0**-10, atol=1e-3)


def test_a_contest_has_three_ways_that_agree():
    # In float32: MLX's gather_mm knows no other dtype on the CPU.
    for contest in list(contests(mx.float32))[::6]:
        check_contest(contest)


def test_what_does_not_fit_is_refused():
    case = batch([0, -1], 2, 8, 64, 6, mx.float16)
    with pytest.raises(ValueError, match="do not fit"):
        lora(*case._replace(adapter=mx.array([0], mx.int32)))
    with pytest.raises(ValueError, match="one dtype"):
        lora(*case._replace(x=case.x.astype(mx.float32)))
    with pytest.raises(ValueError, match="int32"):
        lora(*case._replace(adapter=mx.array([0, 1])[:].astype(mx.uint32)))
    with pytest.raises(ValueError, match="multiples of 8"):
        lora(*batch([0], 1, 4, 64, 6, mx.float16))
