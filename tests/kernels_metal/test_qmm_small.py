"""Up to 8 rows times 4- and 8-bit weights, each row the same bits whatever stands beside it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal.qmm_small import contests, qmm_small, qmm_small_gated
from tests.kernels_metal.affine_cases import Work
from tests.kernels_metal.running import (
    DTYPES,
    assert_near,
    bits_of,
    check_contest,
    dtype_id,
    emulated,
    in_every_order,
)

# Ragged: columns that fill no threadgroup, K that fills no stage nor step, and small arrays.
PLAIN = [
    Work(mx.float16, 4, 64, 8, 576, 37),
    Work(mx.float16, 4, 64, 2, 64, 1),
    Work(mx.bfloat16, 8, 32, 3, 96, 5),
    Work(mx.float32, 4, 64, 5, 640, 34),
]
ALL_FUSED = [
    Work(mx.float16, 8, 128, 6, 384, 19),
    Work(mx.bfloat16, 4, 32, 7, 544, 33),
]
GATED = [
    (Work(mx.bfloat16, 4, 128, 8, 640, 21), "gelu_tanh", True),
    (Work(mx.float32, 4, 64, 2, 64, 1), "silu", False),
]


def check_plain(work: Work) -> None:
    assert_near(in_every_order(lambda: qmm_small(work.x, work.gate)), *work.linear())


def check_all_fused(work: Work) -> None:
    got = in_every_order(
        lambda: qmm_small(work.x, work.gate, bias=work.bias, residual=work.residual)
    )
    assert_near(got, *work.linear_with_all())


def check_gated(work: Work, activation: str, biased: bool) -> None:
    biases = {"gate_bias": work.bias, "up_bias": work.up_bias} if biased else {}
    got = in_every_order(lambda: qmm_small_gated(work.x, work.gate, work.up, activation, **biases))
    assert_near(got, *work.gated(activation, biased=biased))


@pytest.mark.parametrize("work", PLAIN, ids=str)
def test_rows_times_the_weights(work):
    check_plain(work)


@pytest.mark.parametrize("work", ALL_FUSED, ids=str)
def test_bias_and_residual_are_added_before_the_one_rounding(work):
    check_all_fused(work)


@pytest.mark.parametrize(("work", "activation", "biased"), GATED, ids=str)
def test_gate_and_up_in_one_kernel(work, activation, biased):
    check_gated(work, activation, biased)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_packing_in_every_dtype(dtype, bits, group):
    for rows, k, n in ((8, group, 17), (5, 5 * group, 40), (2, 1152, 3)):
        work = Work(dtype, bits, group, rows, k, n)
        check_plain(work)
        check_all_fused(work)
        for activation in ("silu", "gelu_tanh"):
            check_gated(work, activation, True)


@pytest.mark.parametrize("gated", [False, True], ids=["linear", "gated"])
def test_a_row_has_the_same_bits_alone_and_beside_any_others(gated):
    work = Work(mx.float32 if gated else mx.float16, 4, 64, 8, 576, 21)

    def compute(x: mx.array) -> np.ndarray:
        if gated:
            return bits_of(emulated(lambda: qmm_small_gated(x, work.gate, work.up, "silu")))
        return bits_of(emulated(lambda: qmm_small(x, work.gate)))

    together = compute(work.x)
    for rows in range(1, 8):
        np.testing.assert_array_equal(compute(work.x[:rows]), together[:rows])
    for row in range(8):
        np.testing.assert_array_equal(compute(work.x[row : row + 1])[0], together[row])
    # The same row at another place, among rows of infinities and NaN.
    wild = mx.concatenate([mx.full((3, 576), mx.inf), work.x[2:3], mx.full((2, 576), mx.nan)])
    np.testing.assert_array_equal(compute(wild.astype(work.dtype))[3], together[2])


def test_a_contest_has_three_ways_that_agree():
    for contest in list(contests(mx.float32))[:3:2]:  # linear and gated
        check_contest(contest)


def test_more_than_8_rows_are_refused():
    work = Work(mx.float16, 4, 64, 9, 64, 8)
    with pytest.raises(ValueError, match="1 to 8 rows"):
        qmm_small(work.x, work.gate)
