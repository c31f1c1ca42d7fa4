"""Convolutions of recurrent layers against float64 in every lane order, whatever their chunks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal.causal_conv import Run, contests, delta_conv, short_conv
from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.kernel import executed_by
from localllm.kernels_metal.reference import causal_conv as reference
from tests.kernels_metal.lanes import ROUNDING, bits, in_every_order, wide
from tests.kernels_metal.running import check_contest

FLOAT = ROUNDING[mx.float32]


def normal(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return mx.array(values).astype(dtype)


def assert_close(got: mx.array, truth: np.ndarray, size: np.ndarray) -> None:
    """Within one rounding to the dtype, and float32's of sums of a few terms around `size`."""
    allowed = ROUNDING[got.dtype] * np.abs(truth) + 12 * FLOAT * size + 2.0**-25
    assert (np.abs(wide(got) - truth) <= allowed).all()


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize(
    ("channels", "kernel", "run"),
    [(70, 4, Run(2, 5, 3)), (300, 2, Run(0, 1, 1)), (2, 3, Run(1, 2, 2))],
    ids=["ragged", "one row", "tiny"],
)
def test_every_channel_is_convolved_by_itself(channels, kernel, run, dtype):
    taps, state = normal(kernel, channels, seed=1), normal(kernel - 1, channels, seed=2)
    x = normal(8, channels, dtype=dtype)
    y, after = in_every_order(lambda: delta_conv(x, state, taps, run))
    truth, kept = reference.delta_conv(wide(x)[run.rows], wide(state), wide(taps), run.sure)
    sizes, _ = reference.short_conv(
        np.hstack([np.abs(wide(x)[run.rows]), np.ones((run.count, 2 * channels))]),
        np.abs(wide(state)),
        np.abs(wide(taps)),
        run.sure,
    )
    assert_close(y, truth, sizes)
    assert np.array_equal(wide(after), kept)


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_gates_stand_before_and_after_a_short_convolution(dtype, bias):
    run, channels, kernel = Run(1, 4, 2), 70, 3
    taps = normal(kernel + bias, channels, seed=1)
    x, state = normal(6, 3 * channels, dtype=dtype), normal(kernel - 1, channels, seed=2)
    y, after = in_every_order(lambda: short_conv(x, state, taps, run))
    parts = wide(x)[run.rows], wide(state), wide(taps)
    truth, kept = reference.short_conv(*parts, run.sure)
    assert_close(y, truth, reference.short_conv(*map(np.abs, parts), run.sure)[0])
    assert_close(after, kept, np.abs(kept))


@pytest.mark.parametrize("convolve", [delta_conv, short_conv])
def test_neither_chunks_nor_guesses_show_in_a_result(convolve):
    channels, dtype = 40, mx.float16
    x = normal(7, 3 * channels if convolve is short_conv else channels, dtype=dtype)
    taps, state = normal(4, channels, seed=1), normal(3, channels, seed=2)
    with executed_by(Emulator()):
        y, after = convolve(x, state, taps, Run(0, 7, 7))
        rows = []
        for run in (Run(0, 1, 1), Run(1, 4, 4), Run(5, 2, 1), Run(6, 1, 1)):
            part, state = convolve(x, state, taps, run)
            rows.append(part[: run.sure])
    assert bits(mx.concatenate(rows)) == bits(y)
    assert bits(state) == bits(after)


def test_what_does_not_fit_is_refused():
    x, state, taps = normal(4, 9), normal(2, 3), normal(3, 3)
    with pytest.raises(ValueError, match="do not fit"):
        delta_conv(x, state, taps, Run(0, 4, 4))
    with pytest.raises(ValueError, match="do not fit"):
        short_conv(x, state, taps, Run(2, 3, 3))
    with pytest.raises(ValueError, match="sure rows"):
        short_conv(x, state, taps, Run(0, 4, 0))
    with pytest.raises(ValueError, match="float32"):
        short_conv(x, state.astype(mx.float16), taps, Run(0, 4, 4))


def test_mlx_and_the_kernel_agree_where_they_compete():
    for contest in list(contests(mx.float32))[:4]:
        check_contest(contest)


def test_little_more_moves_than_must():
    for contest in list(contests(mx.float16))[:4]:
        emulator = Emulator()
        with executed_by(emulator):
            contest.ours()
        (dispatch,) = emulator.dispatches
        assert contest.least_bytes <= dispatch.counters.moved <= 1.01 * contest.least_bytes
