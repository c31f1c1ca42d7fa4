"""Which examples make up which step: a pure function of the seed and the step's number.

Nothing is remembered from step to step, so a run is resumed at any step by asking for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np

from localllm.errors import InvalidRequest

T = TypeVar("T")
_WINDOW = 32  # steps' worth of shuffled examples that are sorted by length together


@dataclass(frozen=True)
class Step:
    """micro_batches: places of examples in the data, in the order they are computed.

    epoch counts from 0; share: how much of it is done with this step, above 0 and up to 1.
    """

    epoch: int
    share: float
    micro_batches: tuple[tuple[int, ...], ...]


class Batches:
    """lengths: tokens of each example (of a pair, both together).

    By number: a step takes size * accumulate examples, so that how it is cut into micro-batches
    does not change what it learns from. By tokens (`tokens` is not None): micro-batches are filled
    up to so many tokens, and a step takes `accumulate` of them. The last step of an epoch may be
    smaller; every example comes once an epoch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        size: int,
        accumulate: int = 1,
        tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        if not len(lengths):
            raise InvalidRequest("there is no example to train on")
        self._lengths = np.asarray(lengths, np.int64)
        if tokens is not None and int(self._lengths.max()) > tokens:
            raise InvalidRequest(
                f"the longest example has {int(self._lengths.max()):,} tokens, more than the "
                f"{tokens:,} a micro-batch may hold",
                hint="raise --batch-tokens, or lower --seq-len with --on-long drop",
            )
        self._size, self._accumulate, self._tokens, self._seed = size, accumulate, tokens, seed
        self._starts = [0]  # the first step of each epoch looked at so far
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def at(self, step: int) -> Step:
        """The step with this number, from 0."""
        epoch = next((n for n, start in enumerate(self._starts) if start > step), len(self._starts))
        epoch -= 1
        while step >= (end := self._starts[epoch] + len(self._epoch(epoch))):
            epoch += 1
            if epoch == len(self._starts):
                self._starts.append(end)
        steps = self._epoch(epoch)
        place = step - self._starts[epoch]
        return Step(epoch, (place + 1) / len(steps), steps[place])

    def steps_in(self, epochs: float) -> int:
        """Steps of so many epochs, the last one possibly in part; at least 1."""
        whole = int(epochs)
        total = sum(len(self._epoch(number)) for number in range(whole))
        if epochs > whole:
            total += round(len(self._epoch(whole)) * (epochs - whole))
        return max(1, total)

    @cached_property
    def largest(self) -> tuple[int, ...]:
        """The examples of the largest micro-batch that any order could bring, longest first."""
        order = np.argsort(-self._lengths, kind="stable")
        if self._tokens is None:
            return tuple(int(place) for place in order[: self._size])
        filled, room = [], self._tokens
        for place in order:
            if self._lengths[place] <= room:
                filled.append(int(place))
                room -= int(self._lengths[place])
        return tuple(filled)

    def _make_epoch(self, epoch: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
        order = shuffled(len(self._lengths), self._seed, 2 * epoch)
        groups = list(self._groups(order))
        # Steps of one length must not come in a row: they are shuffled once more.
        return tuple(groups[place] for place in shuffled(len(groups), self._seed, 2 * epoch + 1))

    def _groups(self, order: np.ndarray) -> Iterator[tuple[tuple[int, ...], ...]]:
        """The epoch's steps, before they are shuffled."""
        if self._tokens is not None:
            yield from _chunks(self._filled(order), self._accumulate)
            return
        whole = self._size * self._accumulate
        for start in range(0, len(order), whole * _WINDOW):
            window = self._by_length(order[start : start + whole * _WINDOW])
            for group in _chunks(window, whole):
                yield tuple(_chunks(group, self._size))

    def _filled(self, order: np.ndarray) -> Sequence[tuple[int, ...]]:
        """Micro-batches filled up to the budget: first fit, longest first, in windows."""
        made: list[tuple[int, ...]] = []
        mean = max(1, int(self._tokens or 0) // max(1, int(self._lengths.mean())))
        window = mean * self._accumulate * _WINDOW
        for start in range(0, len(order), window):
            bins: list[tuple[int, list[int]]] = []
            for place in reversed(self._by_length(order[start : start + window])):
                length = int(self._lengths[place])
                for number, (room, held) in enumerate(bins):
                    if length <= room:
                        held.append(place)
                        bins[number] = (room - length, held)
                        break
                else:
                    bins.append((int(self._tokens or 0) - length, [place]))
            made += [tuple(held) for _, held in bins]
        # Emptier ones were opened last; mix them, or the windows' ends would come in a row.
        return [made[place] for place in shuffled(len(made), self._seed, len(made))]

    def _by_length(self, places: np.ndarray) -> tuple[int, ...]:
        by_length = np.argsort(self._lengths[places], kind="stable")
        return tuple(int(place) for place in places[by_length])


def shuffled(count: int, seed: int, stream: int) -> np.ndarray:
    """0 … count - 1 in an order that depends on seed and stream alone.

    Sorted by a hash rather than drawn from NumPy's generator, whose draws may change with its
    version; a run must be resumed in the same order for years.
    """
    with np.errstate(over="ignore"):
        key = _mix(np.uint64(seed) + _mix(np.array([stream + 1], np.uint64)))
        return np.argsort(_mix(key + _mix(np.arange(count, dtype=np.uint64))), kind="stable")


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64 (https://prng.di.unimi.it/splitmix64.c)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed


def _chunks(items: Sequence[T], size: int) -> Iterator[tuple[T, ...]]:
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])
