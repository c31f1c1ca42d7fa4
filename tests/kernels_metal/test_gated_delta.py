"""The gated delta rule against float64 in every lane order, whatever its chunks."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.gated_delta import Inputs, contests, gated_delta
from localllm.kernels_metal.kernel import executed_by
from localllm.kernels_metal.reference import gated_delta as reference
from localllm.kernels_metal.runs import MOST_RUNS, Run
from tests.kernels_metal.lanes import bits, in_every_order, wide
from tests.kernels_metal.running import DTYPES, check_contest, dtype_id

TOLERANCE = 1e-6  # of the largest value: some eight of float32's roundings


class Net(NamedTuple):
    """What `gated_delta` takes, all rows of a step."""

    qkv: mx.array
    beta: mx.array
    decay: mx.array
    rate: mx.array
    step: mx.array
    state: mx.array

    def run(self, run: Run, state: mx.array | None = None) -> tuple[mx.array, mx.array]:
        y, (after,) = self.runs((run,), [self.state if state is None else state])
        return y, after

    def runs(self, runs: tuple[Run, ...], states: list[mx.array]) -> tuple[mx.array, list]:
        qkv = self.qkv[runs[0].first : runs[-1].rows.stop]
        return gated_delta(Inputs(qkv, *self[1:5]), states, runs)

    def truth(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        qkv, beta, decay, *others = map(wide, self)
        return reference.gated_delta(
            qkv[run.rows], beta[run.rows], decay[run.rows], *others, run.sure
        )


def net(
    rows: int,
    key_heads: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    dtype: mx.Dtype = mx.float32,
) -> Net:
    rng = np.random.default_rng(rows + key_dim)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, np.float32))

    gates = [(2 * normal(rows, heads)).astype(dtype) for _ in range(2)]
    qkv = normal(rows, 2 * key_heads * key_dim + heads * value_dim)
    state = normal(heads, value_dim, key_dim)
    return Net(qkv, *gates, normal(heads) - 1, normal(heads), state)


def check(case: Net, run: Run) -> None:
    for got, truth in zip(in_every_order(lambda: case.run(run)), case.truth(run), strict=True):
        assert np.abs(wide(got) - truth).max() <= TOLERANCE * np.abs(truth).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_states_are_carried_over_the_rows_of_a_run(dtype):
    check(net(7, 2, 4, 128, 128, dtype), Run(1, 5, 5))


@pytest.mark.parametrize(
    ("key_heads", "heads", "key_dim", "value_dim"),
    [(1, 1, 4, 6), (1, 3, 17, 35), (2, 2, 64, 5), (1, 2, 200, 33)],
)
def test_any_heads_and_sizes(key_heads, heads, key_dim, value_dim):
    check(net(4, key_heads, heads, key_dim, value_dim), Run(0, 4, 2))


def test_gates_hold_at_their_ends():
    """Nothing forgotten or all of it, also where e^x overflows."""
    case = net(5, 1, 2, 32, 8)
    ends = mx.array([[-100.0, 100.0], [-15.0, 15.0], [-8.0, 80.0], [0.0, -0.0], [-40.0, -87.0]])
    check(case._replace(decay=ends, beta=-ends), Run(0, 5, 5))


def test_neither_chunks_nor_guesses_show_in_a_result():
    case = net(9, 2, 4, 40, 24, mx.float16)
    with executed_by(Emulator()):
        y, after = case.run(Run(0, 9, 9))
        rows, state = [], case.state
        for run in (Run(0, 1, 1), Run(1, 5, 5), Run(6, 3, 1), Run(7, 1, 1), Run(8, 1, 1)):
            part, state = case.run(run, state)
            rows.append(part[: run.sure])
    assert bits(mx.concatenate(rows)) == bits(y)
    assert bits(state) == bits(after)


@pytest.mark.parametrize("count", [2, MOST_RUNS])
def test_sequences_are_carried_on_side_by_side_as_if_alone(count):
    case = net(3 * count, 2, 4, 40, 24, mx.bfloat16)
    states = [case.state * (1 + n) for n in range(count)]
    runs = [Run(0, 3, 2), Run(3, 1, 1)]
    runs += [Run(n + 2, 1, 1) for n in range(2, count)]
    y, *afters = in_every_order(lambda: flat(case.runs(tuple(runs), states)))
    with executed_by(Emulator()):
        alone = [case.run(run, state) for run, state in zip(runs, states, strict=True)]
    assert bits(y) == bits(mx.concatenate([part for part, _ in alone]))
    assert [bits(after) for after in afters] == [bits(after) for _, after in alone]


def flat(carried: tuple[mx.array, list[mx.array]]) -> list[mx.array]:
    return [carried[0], *carried[1]]


def test_what_does_not_fit_is_refused():
    case, run = net(3, 1, 2, 8, 8), Run(0, 3, 3)
    with pytest.raises(ValueError, match="key_dim up to 256"):
        net(3, 1, 2, 257, 8).run(run)
    with pytest.raises(ValueError, match="do not fit"):
        case._replace(qkv=case.qkv[:, :-1]).run(run)
    with pytest.raises(ValueError, match="rows of qkv"):
        gated_delta(Inputs(*case[:5]), [case.state], (Run(0, 2, 2),))
    with pytest.raises(ValueError, match="one dtype"):
        case._replace(beta=case.beta.astype(mx.float16)).run(run)
    with pytest.raises(ValueError, match="must be float32"):
        case._replace(rate=case.rate.astype(mx.float16)).run(run)
    with pytest.raises(ValueError, match="float32, of 8 values"):
        case._replace(state=case.state.astype(mx.float16)).run(run)


def test_mlx_and_the_kernel_agree_where_they_compete():
    check_contest(next(contests(mx.bfloat16)))


def test_little_more_moves_than_must():
    contest = next(contests(mx.float16))
    emulator = Emulator()
    with executed_by(emulator):
        contest.ours()
    (dispatch,) = emulator.dispatches
    assert contest.least_bytes <= dispatch.counters.moved <= 1.01 * contest.least_bytes
