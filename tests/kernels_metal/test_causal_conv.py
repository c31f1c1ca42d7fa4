"""Convolutions of recurrent layers against float64 in every lane order, whatever their chunks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal.causal_conv import contests, delta_conv, short_conv
from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.kernel import executed_by
from localllm.kernels_metal.reference import causal_conv as reference
from localllm.kernels_metal.runs import MOST_RUNS, Run
from tests.kernels_metal.lanes import ROUNDING, bits, in_every_order, wide
from tests.kernels_metal.running import check_contest

FLOAT = ROUNDING[mx.float32]


def normal(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return mx.array(values).astype(dtype)


def flat(carried: tuple[mx.array, list[mx.array]]) -> list[mx.array]:
    return [carried[0], *carried[1]]


def assert_close(got: mx.array, truth: np.ndarray, size: np.ndarray) -> None:
    """Within one rounding to the dtype, and float32's of sums of a few terms around `size`."""
    allowed = ROUNDING[got.dtype] * np.abs(truth) + 12 * FLOAT * size + 2.0**-25
    assert (np.abs(wide(got) - truth) <= allowed).all()


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize(
    ("channels", "kernel", "run"),
    [(70, 4, Run(2, 5, 3)), (300, 2, Run(0, 1, 1)), (5, 3, Run(1, 2, 2))],
    ids=["ragged", "one row", "tiny"],
)
def test_every_channel_is_convolved_by_itself(channels, kernel, run, dtype):
    taps, state = normal(kernel, channels, seed=1), normal(kernel - 1, channels, seed=2)
    x = normal(8, channels, dtype=dtype)
    y, after = in_every_order(lambda: flat(delta_conv(x, [state], taps, (run,))))
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
    y, after = in_every_order(lambda: flat(short_conv(x, [state], taps, (run,))))
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
        y, (after,) = convolve(x, [state], taps, (Run(0, 7, 7),))
        rows = []
        for run in (Run(0, 1, 1), Run(1, 4, 4), Run(5, 2, 1), Run(6, 1, 1)):
            part, (state,) = convolve(x, [state], taps, (run,))
            rows.append(part[: run.sure])
    assert bits(mx.concatenate(rows)) == bits(y)
    assert bits(state) == bits(after)


@pytest.mark.parametrize("convolve", [delta_conv, short_conv])
def test_sequences_are_carried_on_side_by_side_as_if_alone(convolve):
    channels = 40
    x = normal(13, 3 * channels if convolve is short_conv else channels, dtype=mx.bfloat16)
    taps, states = normal(4, channels, seed=1), [normal(3, channels, seed=n) for n in range(2, 6)]
    runs = Run(1, 1, 1), Run(2, 6, 4), Run(8, 2, 1), Run(10, 2, 2)
    together = in_every_order(lambda: flat(convolve(x, states, taps, runs)))
    with executed_by(Emulator()):
        alone = [convolve(x, [s], taps, (run,)) for s, run in zip(states, runs, strict=True)]
    assert bits(together[0]) == bits(mx.concatenate([y for y, _ in alone]))
    assert [bits(a) for a in together[1:]] == [bits(after) for _, (after,) in alone]


def test_what_does_not_fit_is_refused():
    x, states, taps, runs = normal(4, 12), [normal(2, 4)], normal(3, 4), (Run(0, 4, 4),)
    with pytest.raises(ValueError, match="do not fit"):
        delta_conv(x, states, taps, runs)
    with pytest.raises(ValueError, match="taps float32"):
        short_conv(x, states, taps.astype(mx.float16), runs)
    with pytest.raises(ValueError, match="float32, of 8 values"):
        short_conv(x, [states[0].astype(mx.float16)], taps, runs)
    with pytest.raises(ValueError, match="2 states of one shape"):
        short_conv(x, states, taps, (Run(0, 2, 2), Run(2, 2, 2)))
    beyond, unsure, apart = (Run(2, 3, 3),), (Run(0, 4, 0),), (Run(0, 1, 1), Run(2, 2, 2))
    for wrong in (beyond, unsure, apart, tuple(Run(0, 0, 1) for _ in range(MOST_RUNS + 1))):
        with pytest.raises(ValueError, match="sure rows, one behind the other within 4 rows"):
            short_conv(x, states, taps, wrong)


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
