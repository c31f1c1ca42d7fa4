"""Speculation: cheap guesses at the next tokens, which one step of the model then checks.

A guess is never believed: the token at every position is the model's own draw, with the noise
that belongs to the request's seed and that position, and a guess that equals the draw merely
saves a step. So answers are the same with and without, seed by seed.

How many tokens to guess is decided by what they have cost and brought so far (`Pace`), down to
none; drafters that know how sure they are of a guess end a row of them where it no longer pays
(`Worth`).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np

from localllm.engine.sequence import Sequence

MAX_DRAFTS = 15  # for one sequence in one step
_PROBE_EVERY = 48  # steps without a guess after which one is tried all the same
_FADE = 0.97  # of what a step tells, with every further step
_LATEST = 15  # times of which the median counts
_MOST_ROWS = 64  # of steps whose sizes are told apart
_SURE = 0.95  # chance of a guess that a drafter which knows its chances may be sure of


class Worth:
    """Whether one more guess for a sequence makes its time per token shorter, as the chances of
    those before become known.

    seconds: [most + 1], what a step takes of the sequence's time with so many guesses. guess: what
    making one takes.
    """

    def __init__(self, seconds: Seq[float], guess: float) -> None:
        self._seconds, self._guess = seconds, guess
        self._kept = 0
        self._time = seconds[0]
        self._tokens = self._chance = 1.0

    def another(self, chance: float) -> bool:
        """Of one not made yet. chance: that it is right where all before are, on average."""
        if self._kept + 1 >= len(self._seconds):
            return False
        cost = self._guess + chance * self._row  # one that is not kept costs no row
        return self._chance * chance * self._time > self._tokens * cost

    def keep(self, chance: float) -> bool:
        """Of the one just made, whose chance is known: whether the model is to check it. If not,
        nothing follows it."""
        self._time += self._guess
        right = self._chance * chance
        if right * self._time <= self._tokens * self._row:
            return False
        self._time += self._row
        self._tokens += right
        self._chance = right
        self._kept += 1
        return True

    @property
    def _row(self) -> float:
        """What the model takes longer for one more."""
        return max(0.0, self._seconds[self._kept + 1] - self._seconds[self._kept])


class Wish(NamedTuple):
    """`most` guesses for a sequence, fewer where `worth` says so."""

    sequence: Sequence
    most: int
    worth: Worth


class Drafter(Protocol):
    """Guesses what follows sequences. `name` is what receipts say."""

    name: str
    wants_states: bool  # whether it needs `observe`
    knows_chances: bool  # whether it asks `Worth` before and after each guess

    @property
    def row_cost(self) -> float:
        """Seconds that one guess has cost lately."""
        ...

    def ready(self, sequence: Sequence) -> float | None:
        """The chance that its first guess would be right, None where it has none."""
        ...

    def propose(self, wishes: Seq[Wish]) -> list[list[int]]:
        """For each sequence tokens to follow those it has."""
        ...

    def observe(self, sequence: Sequence, start: int, states: np.ndarray) -> None:
        """The model's hidden states float32 [n, hidden] at the positions from `start` on, all of
        tokens that stand. The model computes every position once, but for what is preempted."""
        ...

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """How its last guesses for the sequence did."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        ...


class Recent:
    """The median of the last times that something took: other work on the machine makes some of
    them far too long, and a mean of few would believe it."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_LATEST)
        self.median = 0.0  # asked for more often than times come

    def record(self, seconds: float) -> None:
        self._seconds.append(seconds)
        self.median = statistics.median(self._seconds)


class Pace:
    """Seconds of a step by its rows: a + b · rows, fitted to the last steps that only decoded, and
    for sizes that came up lately what those took: two rows may cost what one does, three not."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._steps = 0
        self._sizes: dict[int, _Size] = {}

    def record(self, rows: int, seconds: float) -> None:
        # Old steps fade: contexts grow, and other work on the machine comes and goes.
        self._n = _FADE * self._n + 1
        self._x = _FADE * self._x + rows
        self._y = _FADE * self._y + seconds
        self._xx = _FADE * self._xx + rows * rows
        self._xy = _FADE * self._xy + rows * seconds
        self._steps += 1
        if rows <= _MOST_ROWS:
            size = self._sizes.setdefault(rows, _Size())
            size.count = size.count_at(self._steps) + 1
            size.at = self._steps
            size.seconds.record(seconds)

    def seconds(self, rows: int) -> float:
        """Of a step of so many rows, in any unit until the first was seen."""
        a, b = self.line()
        size = self._sizes.get(rows)
        if size is None:
            return a + b * rows
        count = size.count_at(self._steps)
        return (count * size.seconds.median + a + b * rows) / (count + 1)

    def line(self) -> tuple[float, float]:
        """(a, b), in any unit; until steps of several sizes were seen, b is a fifth of both."""
        if not self._n:
            return 0.8, 0.2
        mean, rows = self._y / self._n, self._x / self._n
        usual = mean / (4 + rows)
        spread = self._xx / self._n - rows**2
        along = self._xy / self._n - rows * mean
        slope = (along + 0.5 * usual) / (spread + 0.5)
        slope = min(max(slope, 0.01 * mean / rows), mean / rows)
        return mean - slope * rows, slope


@dataclass
class _Size:
    """Steps of one size. count: how many, those before `at` faded with every step since."""

    count: float = 0.0
    at: int = 0
    seconds: Recent = field(default_factory=Recent)

    def count_at(self, step: int) -> float:
        return self.count * _FADE ** (step - self.at)


class Speculator:
    """Shares out guesses over the sequences of a step so that tokens per second are most."""

    def __init__(self, drafters: Seq[Drafter]) -> None:
        self.drafters = {drafter.name: drafter for drafter in drafters}
        self.pace = Pace()
        self.error: Exception | None = None  # the last that a drafter raised
        self._idle: dict[int, int] = {}  # steps since a sequence last had a guess

    def propose(self, sequences: Seq[Sequence], rows: int) -> None:
        """Sets the drafts of decoding sequences, `rows` altogether at most."""
        for sequence in sequences:
            sequence.speculation.drafts.clear()
        wishes: dict[str, list[Wish]] = {}
        shares = self._share(sequences, rows)
        counts = [count for _, drafter, count, _ in shares if drafter.knows_chances]
        seconds = self._seconds(len(sequences), len(shares), max(counts, default=0))
        for sequence, drafter, count, trying in shares:
            worth = Worth([1.0, 1.0], 0.0) if trying else Worth(seconds, drafter.row_cost)
            wishes.setdefault(drafter.name, []).append(Wish(sequence, count, worth))
        for name, wished in wishes.items():
            try:
                proposals = self.drafters[name].propose(wished)
            except Exception as error:  # a step without guesses is slower, not wrong
                self.error = error
                proposals = [[] for _ in wished]
            for (sequence, count, _), drafts in zip(wished, proposals, strict=True):
                state = sequence.speculation
                state.drafts[:] = drafts[:count]
                state.drafter = state.used = name if drafts else state.used
                self._idle[sequence.id] = 0

    def _seconds(self, sequences: int, drafting: int, most: int) -> list[float]:
        """One sequence's share of a step, when `drafting` of them have 0 … most guesses."""
        steps = (self.pace.seconds(sequences + i * drafting) for i in range(most + 1))
        return [longest / sequences for longest in accumulate(steps, max)]

    @property
    def wants_states(self) -> bool:
        return any(drafter.wants_states for drafter in self.drafters.values())

    def observe(self, sequence: Sequence, start: int, states: np.ndarray) -> None:
        """What a step computed of the sequence, as `Drafter.observe`."""
        for name, drafter in self.drafters.items():
            if drafter.wants_states and sequence.request.params.speculation in ("auto", name):
                drafter.observe(sequence, start, states)

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """What became of a step's drafts."""
        state = sequence.speculation
        state.drafted += drafted
        state.accepted += accepted
        if drafted:
            assert state.drafter is not None
            self.drafters[state.drafter].learn(sequence, drafted, accepted)

    def forget(self, sequence: Sequence) -> None:
        self._idle.pop(sequence.id, None)
        for drafter in self.drafters.values():
            drafter.forget(sequence)

    def _share(
        self, sequences: Seq[Sequence], rows: int
    ) -> list[tuple[Sequence, Drafter, int, bool]]:
        """Guesses in order of their chance, while each shortens the time per token; and whether
        one is made to try it again, though it does not seem to."""
        step_rows, tokens, drafting = len(sequences), float(len(sequences)), 0.0
        step = self.pace.seconds(step_rows)
        chosen: list[tuple[Sequence, Drafter, float]] = []
        for sequence in sequences:
            found = self._drafter(sequence)
            if found is not None:
                chosen.append((sequence, *found))
        counts = [0] * len(chosen)
        open_guesses = [(-chance, index) for index, (_, _, chance) in enumerate(chosen)]
        heapify(open_guesses)
        while open_guesses and rows > 0:
            negative, index = heappop(open_guesses)
            sequence, drafter, first = chosen[index]
            longer = self.pace.seconds(step_rows + 1)
            cost = max(0.0, longer - step) + drafter.row_cost
            if -negative * (step + drafting) <= tokens * cost:
                break
            tokens -= negative
            step, drafting = max(step, longer), drafting + drafter.row_cost
            step_rows += 1
            rows -= 1
            counts[index] += 1
            if counts[index] < self._most(sequence):
                following = _SURE if drafter.knows_chances else first
                heappush(open_guesses, (negative * following, index))
        shares = []
        for (sequence, drafter, _), count in zip(chosen, counts, strict=True):
            trying = count == 0 and rows > 0 and self._long_idle(sequence)
            if trying:
                count = 1  # lest a bad beginning rule guessing out for good
                rows -= 1
            if count:
                shares.append((sequence, drafter, count, trying))
        return shares

    def _long_idle(self, sequence: Sequence) -> bool:
        idle = self._idle[sequence.id] = self._idle.get(sequence.id, 0) + 1
        return idle >= _PROBE_EVERY

    @staticmethod
    def _most(sequence: Sequence) -> int:
        return min(MAX_DRAFTS, sequence.limit - len(sequence.tokens) - 1)

    def _drafter(self, sequence: Sequence) -> tuple[Drafter, float] | None:
        """The drafter that is likeliest to be right, and its chance."""
        wish = sequence.request.params.speculation
        if wish == "off" or self._most(sequence) < 1:
            return None
        best: tuple[Drafter, float] | None = None
        for name, drafter in self.drafters.items():
            if wish not in ("auto", name):
                continue
            chance = drafter.ready(sequence)
            if chance is not None and (best is None or chance > best[1]):
                best = drafter, chance
        return best
