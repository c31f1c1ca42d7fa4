"""Rows of several sequences in a step, each with a state of its own that it carries on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

from localllm.kernels_metal.kernel import MetalKernel

MOST_RUNS = 8  # that one launch takes: each needs two of the 31 buffers that Metal binds
LEAST_STATE = 8  # values: MLX binds smaller arrays in another address space


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one sequence among those of a step.

    first: the first of them. count: how many. sure: after so many, 1 at least, the state is wanted.
    """

    first: int
    count: int
    sure: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)


# One behind the other, MOST_RUNS at most.
Runs = tuple[Run, ...]
# What their rows give [rows of all, …], and the state of each after its sure rows.
Carried = tuple[mx.array, list[mx.array]]


def rows_of(runs: Runs) -> int:
    """Of all of them."""
    return runs[-1].first + runs[-1].count - runs[0].first


def arrays_of(carried: Carried) -> list[mx.array]:
    y, states = carried
    return [y, *states]


def joined(parts: Sequence[mx.array]) -> mx.array:
    """Along the rows."""
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts))


@lru_cache(maxsize=256)
def as_array(runs: Runs) -> mx.array:
    """int32 [runs, 3]: first, count, sure."""
    return mx.array([(run.first, run.count, run.sure) for run in runs], mx.int32)


@lru_cache(maxsize=2 * MOST_RUNS)
def kernel_of_runs(name: str, inputs: tuple[str, ...], count: int) -> MetalKernel:
    """Beside `inputs` it takes `runs` and `count` states, and gives y and as many states.

    Its source finds them as STATES and AFTERS.
    """
    states, afters = ([f"{of}_{n}" for n in range(count)] for of in ("state", "after"))
    lists = {"STATES": ", ".join(states), "AFTERS": ", ".join(afters)}
    return MetalKernel(name, [*inputs, "runs", *states], ["y", *afters], lists)


def check_runs(runs: Runs, states: Sequence[mx.array], rows: int) -> None:
    """Raises ValueError for runs that do not follow each other within `rows`, or have no sure rows,
    and for states that are not as many, of one shape, float32 and large enough."""
    ends = [run.rows.stop for run in runs]
    follow = [run.first for run in runs[1:]] == ends[:-1] and ends[-1] <= rows
    if not follow or len(runs) > MOST_RUNS or not all(0 < r.sure <= r.count for r in runs):
        raise ValueError(
            f"up to {MOST_RUNS} runs with sure rows, one behind the other within {rows} rows, are "
            f"needed, not {runs}"
        )
    shapes = {state.shape for state in states}
    fit = all(state.dtype == mx.float32 and state.size >= LEAST_STATE for state in states)
    if not fit or len(states) != len(runs) or len(shapes) != 1:
        raise ValueError(
            f"{len(runs)} states of one shape are needed, float32, of {LEAST_STATE} values at "
            f"least, not {len(states)} of {shapes}"
        )
