"""Whether a run fits into memory: planned, then tried with the micro-batch that takes most."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from localllm.errors import OutOfMemoryPlan
from localllm.machine import (
    allocating_at_most,
    forget_peak_memory,
    memory,
    resident_memory,
    return_freed_memory,
)
from localllm.train.base import base_weights
from localllm.train.batching import Batches
from localllm.train.config import TrainConfig
from localllm.train.parts import Parts, available_memory, lengths_of, tokens_of
from localllm.train.planner import MemoryPlan, Needs, Wish, advice, plan_memory, require_fit
from localllm.train.program import Program
from localllm.train.stepping import Stepper

_ENGINE = 128 << 20  # bytes of an engine beside its weights
_ASKED = 2000  # steps that are asked for the memory they take


@dataclass(frozen=True)
class Planned:
    """plan: what the run takes; needs, wish: what that was computed from. largest: the places in
    the data of the micro-batch that takes most."""

    plan: MemoryPlan
    needs: Needs
    wish: Wish
    largest: tuple[int, ...]


def plan_run(parts: Parts, config: TrainConfig, batches: Batches, stepper: Stepper) -> Planned:
    """Raises OutOfMemoryPlan with what would fit."""
    batch = config.batch
    largest = _largest(parts, config, batches)
    return_freed_memory()
    needs = Needs(
        resident=resident_memory()[0] or 0,
        examples=tuple(lengths_of(parts.data.train[place]) for place in largest),
        working=parts.program.working_bytes,
        vector=4 * parts.layout.size,
        accumulated=batch.accumulate > 1,
        optimizer=sum(array.nbytes for array in stepper.optimizer.state().values()),
        beside=_engine_bytes(config),
    )
    wish = Wish(
        batch.size,
        batch.accumulate,
        config.data.seq_len or 0,
        parts.budget,
        whole=not parts.layout.scales,
        shortest=1 + min(max(lengths_of(example)) for example in parts.data.train),
    )
    plan = plan_memory(needs, available_memory())
    require_fit(plan, needs, wish)
    return Planned(plan, needs, wish, largest)


def rehearse(
    planned: Planned, program: Program, stepper: Stepper, parameters: np.ndarray
) -> int | None:
    """Computes the largest micro-batch for nothing; the process's memory at its highest meanwhile.

    None where the system does not tell that apart from what loading took. Raises OutOfMemoryPlan
    with what would fit.
    """
    needs = planned.needs
    alone = forget_peak_memory()  # else the highest may have been while loading
    # Gradient and optimizer have their addresses already, but no memory before they are written.
    promised = needs.vector * (1 + needs.accumulated) + needs.optimizer + needs.beside
    free = memory().available - promised
    try:
        with allocating_at_most(free) if program.survives_full_memory else nullcontext():
            stepper.dry(planned.largest, parameters)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # It was a fifth of the micro-batch too much, at least.
        enough = planned.plan.total - needs.working(needs.lengths) // 5
        raise OutOfMemoryPlan(
            f"the largest micro-batch ({sum(needs.lengths):,} tokens) ran out of memory: {error}",
            hint=advice(needs, planned.wish, min(enough, planned.plan.available)),
        ) from error
    return resident_memory()[1] if alone else None


def _largest(parts: Parts, config: TrainConfig, batches: Batches) -> tuple[int, ...]:
    """The micro-batch that takes most memory, longest example first.

    That need not be the one of most tokens, so those of the first epoch are asked for as well.
    """
    asked = [batches.largest]
    for step in range(min(batches.steps_in(1), config.run.steps or 1, _ASKED)):
        asked += batches.at(step).micro_batches

    def taken(places: tuple[int, ...]) -> int:
        rows = [length for place in places for length in lengths_of(parts.data.train[place])]
        return parts.program.working_bytes(rows)

    most = max(asked, key=taken)
    return tuple(sorted(most, key=lambda place: -tokens_of(parts.data.train[place])))


def _engine_bytes(config: TrainConfig) -> int:
    """What the engine for sample answers takes: the model's files again, and a small KV cache."""
    if not config.run.sample_every:
        return 0
    path = base_weights(config.model, offline=config.offline or None).path
    if path is None:
        return 0
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files) + _ENGINE


def is_out_of_memory(error: BaseException) -> bool:
    """Python says MemoryError; C++ and MLX say it in words."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(
        word in words for word in ("bad_alloc", "out of memory", "unable to allocate", "malloc")
    )
