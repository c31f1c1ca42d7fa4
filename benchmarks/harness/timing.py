"""Both sides in turn, and medians of what they took."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.harness.side import Side

Measure = Callable[[Side], list[float]]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds of every step of every round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median over the rounds of each round's median step."""
        return statistics.median(statistics.median(steps) for steps in self.rounds)

    @property
    def spread(self) -> float:
        """The slowest round's median over the fastest one's."""
        medians = [statistics.median(steps) for steps in self.rounds]
        return max(medians) / min(medians)


def alternate(sides: Mapping[str, Side], measure: Measure, rounds: int) -> dict[str, Timing]:
    """The same work on each side in turn: see `take_turns`."""
    return take_turns({name: (side, measure) for name, side in sides.items()}, rounds)


def take_turns(turns: Mapping[Key, tuple[Side, Measure]], rounds: int) -> dict[Key, Timing]:
    """Each once for warmth, then `rounds` rounds; every other round in reverse order."""
    timings = {key: Timing() for key in turns}
    for side, measure in turns.values():
        measure(side)
        side.pause()
    for turn in range(rounds):
        for key in list(turns) if turn % 2 == 0 else reversed(turns):
            side, measure = turns[key]
            timings[key].rounds.append(measure(side))
            side.pause()
    return timings
