"""RMSNorm, with and without the addition before it, against float64 in every lane order."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.kernel import executed_by
from localllm.kernels_metal.reference import rms_norm as reference
from localllm.kernels_metal.rms_norm import add_rms_norm, contests, rms_norm
from tests.kernels_metal.lanes import ROUNDING, bits, in_every_order, wide

DTYPES = list(ROUNDING)
FLOAT = ROUNDING[mx.float32]


def rows(n: int, d: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    values = np.random.default_rng(seed).standard_normal((n, d), np.float32)
    return mx.array(values).astype(dtype)


def summing(d: int) -> float:
    """A bound on the relative error of a float32 sum of d squares: its longest chain of roundings,
    16 in a thread, 5 in a simdgroup and 5 across them, and one for each square."""
    return FLOAT * min(d, 27)


def assert_close(got: mx.array, truth: np.ndarray, allowed: np.ndarray) -> None:
    worst = np.max(np.abs(wide(got) - truth) / allowed)
    assert worst <= 1.0, f"{worst} of the error allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 33, 576])
def test_a_row_is_normalized(d: int, dtype: mx.Dtype) -> None:
    x, weight = rows(3, d, dtype), rows(1, d, mx.float32, 1)[0].astype(dtype)
    (got,) = in_every_order(lambda: [rms_norm(x, weight, 1e-5, offset=1.0)])
    truth = reference.rms_norm(wide(x), wide(weight), 1e-5, 1.0)
    # Rounded once to T; in float32 the sum, the root and three products before. weight + 1 may
    # cancel: its rounding is of the size of 1.
    scaled = np.abs(wide(x)) / np.sqrt(np.mean(wide(x) ** 2, -1, keepdims=True) + 1e-5)
    allowed = (ROUNDING[dtype] + summing(d) + 4 * FLOAT) * np.abs(truth) + 2 * FLOAT * scaled
    # Half values below the normal range are rounded to multiples of 2^-24.
    assert_close(got, truth, allowed + 2.0**-25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(5, 200), (1, 4099), (2, 16384)])
def test_a_sum_is_made_and_normalized(n: int, d: int, dtype: mx.Dtype) -> None:
    x, residual, weight = rows(n, d, dtype), rows(n, d, dtype, 1), rows(1, d, mx.float32, 2)[0]
    total, normed = in_every_order(
        lambda: add_rms_norm(x, residual, weight, 1e-6, offset=0.0, scale=0.22)
    )
    scale = float(np.float32(0.22))
    sums, truth = reference.add_rms_norm(wide(x), wide(residual), wide(weight), 1e-6, scale=scale)
    unit = ROUNDING[dtype]
    # Product and sum are rounded in float32, then the sum to T.
    rounded = unit * np.abs(sums) + 2 * FLOAT * (np.abs(wide(residual)) + np.abs(wide(x) * scale))
    assert_close(total, sums, rounded + 2.0**-25)
    # The sum's rounding goes through the norm; it moves the root by at most its largest share.
    factor = np.abs(wide(weight)) / np.sqrt(np.mean(sums**2, -1, keepdims=True) + 1e-6)
    allowed = 1.01 * rounded * factor + (2 * unit + summing(d) + 4 * FLOAT) * np.abs(truth)
    assert_close(normed, truth, allowed + 2.0**-24)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [4, 127, 1024, 2560, 4096, 5376, 8191, 8193, 12288, 16383])
def test_every_width(d: int, dtype: mx.Dtype) -> None:
    test_a_row_is_normalized(d, dtype)
    test_a_sum_is_made_and_normalized(3, d, dtype)


def test_what_is_normalized_is_the_rounded_sum() -> None:
    x, residual, weight = rows(2, 96, mx.bfloat16), rows(2, 96, mx.bfloat16, 1), mx.ones(96)
    with executed_by(Emulator()):
        total, normed = add_rms_norm(x, residual, weight, 1e-5)
        alone = rms_norm(total, weight, 1e-5)
    assert bits(normed) == bits(alone)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, residual, weight = rows(4, 130, mx.float16), rows(4, 130, mx.float16, 1), mx.ones(130)
    with executed_by(Emulator()):
        together = add_rms_norm(x, residual, weight, 1e-5)
        alone = add_rms_norm(x[2:3], residual[2:3], weight, 1e-5)
    assert [bits(a[2:3]) for a in together] == [bits(a) for a in alone]


def test_what_the_kernel_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="d up to 16384"):
        rms_norm(mx.zeros((1, 16385)), mx.zeros(16385), 1e-5)
    with pytest.raises(ValueError, match="a weight"):
        rms_norm(mx.zeros((1, 8)), mx.zeros(8, mx.float16), 1e-5)
    with pytest.raises(ValueError, match="the residual"):
        add_rms_norm(mx.zeros((1, 8)), mx.zeros((2, 8)), mx.zeros(8), 1e-5)


def test_mlx_and_the_kernel_agree_where_they_compete() -> None:
    contest = next(contests(mx.float16))
    assert contest.mlx is not None
    with executed_by(Emulator()):
        ours = contest.ours()
    for outputs in (ours, contest.mlx()):
        for got, truth in zip(outputs, contest.truth(), strict=True):
            largest = np.abs(truth).max()
            assert np.abs(wide(got) - truth).max() <= contest.tolerance * largest


def test_little_more_moves_than_must() -> None:
    for contest in list(contests(mx.float16))[:3]:
        emulator = Emulator()
        with executed_by(emulator):
            contest.ours()
        (dispatch,) = emulator.dispatches
        assert contest.least_bytes <= dispatch.counters.moved <= 1.05 * contest.least_bytes
