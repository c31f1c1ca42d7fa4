"""How the learning rate moves: a factor from 0 to 1 for every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from localllm.errors import InvalidRequest

SCHEDULES = ("constant", "linear", "cosine", "wsd")


@dataclass(frozen=True)
class Schedule:
    """schedule(step) -> factor; step counts from 0.

    warmup: steps of a straight rise, the first of which already moves. After it "constant" stays,
    "linear" and "cosine" fall to `minimum`, "wsd" stays and falls in a straight line over the last
    `decay` steps (https://arxiv.org/abs/2404.06395).
    """

    name: str
    steps: int
    warmup: int = 0
    minimum: float = 0.0
    decay: int = 0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "constant":
            return 1.0
        start = self.steps - self.decay if self.name == "wsd" else self.warmup
        if step < start:
            return 1.0
        done = min(1.0, (step - start) / max(1, self.steps - start))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.name == "cosine" else 1 - done
        return self.minimum + (1 - self.minimum) * left


def make_schedule(
    name: str, steps: int, *, warmup: float = 0.0, minimum: float = 0.0, decay: float = 0.2
) -> Schedule:
    """warmup, decay: steps, or below 1 their share of all. Raises InvalidRequest for nonsense."""
    if name not in SCHEDULES:
        raise InvalidRequest(
            f"there is no schedule {name!r}", hint=f"there are {', '.join(SCHEDULES)}"
        )
    if not 0 <= minimum <= 1:
        raise InvalidRequest(f"the schedule's end must be from 0 to 1, not {minimum:g}")
    rising, falling = _steps("warm-up", warmup, steps), _steps("decay", decay, steps)
    falling = 0 if name != "wsd" else max(falling, int(decay > 0))
    if rising + falling > steps:
        raise InvalidRequest(
            f"{rising} steps of warm-up and {falling} of decay are more than all {steps}"
        )
    return Schedule(name, steps, rising, minimum, falling)


def _steps(what: str, value: float, steps: int) -> int:
    if not (math.isfinite(value) and value >= 0):
        raise InvalidRequest(f"the {what} must be at least 0, not {value:g}")
    return round(value * steps) if value < 1 else round(value)
