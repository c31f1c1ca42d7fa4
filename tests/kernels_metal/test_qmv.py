"""One row times 4- and 8-bit weights is what float64 makes of them, whatever is fused in."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal.qmv import contests, qmv, qmv_gated
from localllm.kernels_metal.reference import qmv as reference
from tests.kernels_metal.affine_cases import EPSILON, Work
from tests.kernels_metal.running import (
    DTYPES,
    assert_near,
    check_contest,
    dtype_id,
    emulated,
    f64,
    in_every_order,
)

# Ragged: rows that fill no threadgroup, K that fills no step, and arrays of fewer than 8 elements.
PLAIN = [
    Work(mx.float16, 4, 64, 1, 576, 37),
    Work(mx.float16, 4, 64, 1, 64, 1),
    Work(mx.bfloat16, 8, 32, 1, 96, 5),
    Work(mx.float32, 4, 64, 1, 384, 18),
]
ALL_FUSED = [
    Work(mx.float16, 8, 128, 1, 384, 19),
    Work(mx.bfloat16, 4, 32, 1, 1184, 21),
]
GATED = [
    (Work(mx.bfloat16, 4, 128, 1, 640, 13), "gelu_tanh", True),
    (Work(mx.float32, 4, 64, 1, 64, 1), "silu", False),
]


def check_plain(work: Work) -> None:
    assert_near(in_every_order(lambda: qmv(work.x, work.gate)), *work.linear())


def check_all_fused(work: Work) -> None:
    got = in_every_order(lambda: qmv(work.x, work.gate, bias=work.bias, residual=work.residual))
    assert_near(got, *work.linear_with_all())


def check_gated(work: Work, activation: str, biased: bool) -> None:
    biases = {"gate_bias": work.bias, "up_bias": work.up_bias} if biased else {}
    got = in_every_order(lambda: qmv_gated(work.x, work.gate, work.up, activation, **biases))
    assert_near(got, *work.gated(activation, biased=biased))


@pytest.mark.parametrize("work", PLAIN, ids=str)
def test_a_row_times_the_weights(work):
    check_plain(work)


@pytest.mark.parametrize("work", ALL_FUSED, ids=str)
def test_bias_and_residual_are_added_before_the_one_rounding(work):
    check_all_fused(work)


@pytest.mark.parametrize(("work", "activation", "biased"), GATED, ids=str)
def test_gate_and_up_in_one_kernel(work, activation, biased):
    check_gated(work, activation, biased)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_are_exact_near_zero_and_do_not_overflow_far_off(activation):
    work, far = Work(mx.float32, 4, 64, 1, 64, 40), [-1e4, -200.0, -100.0, 100.0, 200.0, 1e4]
    gate = mx.concatenate([mx.linspace(-8, 8, 34), mx.array(far)])
    got = emulated(
        lambda: qmv_gated(
            mx.zeros((1, 64)), work.gate, work.up, activation, gate_bias=gate, up_bias=mx.ones(40)
        )
    )
    with np.errstate(over="ignore"):
        truth = reference.activate(f64(gate), activation)[None]
    # A dozen float32 operations; the exponential amplifies the error of an argument of up to 20.
    # The second term is what the float64 truth loses where 1 + tanh cancels.
    assert_near(got, truth, 40 * EPSILON * np.abs(truth) + 4e-16 * np.abs(f64(gate)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_packing_in_every_dtype(dtype, bits, group):
    for k, n in ((group, 17), (5 * group, 40), (1152, 3)):
        work = Work(dtype, bits, group, 1, k, n)
        check_plain(work)
        check_all_fused(work)
        for activation in ("silu", "gelu_tanh"):
            check_gated(work, activation, True)


def test_a_contest_has_three_ways_that_agree():
    # In float32: MLX's CPU matmul of half precision adds up in half precision.
    for contest in list(contests(mx.float32))[:3]:
        check_contest(contest)


def test_what_does_not_fit_is_refused():
    work, other = Work(mx.float16, 4, 64, 1, 64, 8), Work(mx.float16, 4, 64, 2, 128, 8)
    with pytest.raises(ValueError, match="one row"):
        qmv(other.x, other.gate)
    with pytest.raises(ValueError, match="does not fit"):
        qmv(work.x, other.gate)
    with pytest.raises(ValueError, match="bias must be"):
        qmv(work.x, work.gate, bias=mx.zeros(7, mx.float16))
    with pytest.raises(ValueError, match="scales must be"):
        qmv(work.x.astype(mx.float32), work.gate)
    with pytest.raises(ValueError, match="groups"):
        qmv(work.x, work.gate._replace(group=16))
    with pytest.raises(ValueError, match="packed alike"):
        qmv_gated(work.x, work.gate, other.up, "silu")
    with pytest.raises(ValueError, match="both, or none"):
        qmv_gated(work.x, work.gate, work.up, "silu", gate_bias=work.bias)
