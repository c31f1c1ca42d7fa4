"""Times of several pieces of work, taken in turns, so that a disturbance meets them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_LEAST = 0.05  # seconds of one timing; shorter work is repeated
_MOST_REPEATS = 32


@dataclass(frozen=True)
class Figure:
    """Seconds that one piece of work took: the median of `rounds`, the fastest and the slowest."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def spread(self) -> float:
        return self.high / self.low


def figure(times: Sequence[float]) -> Figure:
    return Figure(statistics.median(times), min(times), max(times), len(times))


def timed(work: Callable[[], object], repeats: int = 1) -> float:
    """Seconds that `work` takes, the mean of `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def take_turns(works: Sequence[Callable[[], object]], rounds: int, seconds: float) -> list[Figure]:
    """Times each of `works` once a round, for `rounds` rounds or as many as fit into `seconds`.

    One round at least is run, after a first call of each that is not counted.
    """
    end = time.perf_counter() + seconds
    repeats = [max(1, min(_MOST_REPEATS, math.ceil(_LEAST / timed(work)))) for work in works]
    times: list[list[float]] = [[] for _ in works]
    longest = 0.0
    for number in range(rounds):
        began = time.perf_counter()
        if number and began + longest > end:
            break
        for own, work, count in zip(times, works, repeats, strict=True):
            own.append(timed(work, count))
        longest = max(longest, time.perf_counter() - began)
    return [figure(own) for own in times]
