"""Where guesses come from: the text so far, a smaller model, or a head over the hidden states."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from localllm.backend.head_network import HeadRows, head_network
from localllm.backend.protocol import Backend, Batch, Chunk, StepCancelled
from localllm.checkpoint.tensor import Tensor
from localllm.engine.kv_cache import BlockTable, KvCache
from localllm.engine.sequence import Sequence
from localllm.engine.speculative import MAX_DRAFTS, Recent, Wish
from localllm.models.draft_head import DraftHead
from localllm.sampling import Sampler, draw_batch

_RATE = 0.2  # how quickly the latest guess changes a chance
_STEADY_RATE = 0.08  # of drafters that know the language: a few misses in a row say little
_WINDOW = 512  # hidden states of a sequence that wait for the first guess, at most
# Kinds of guesses by the probability that the drafter itself gives them: limits, and how often the
# model agrees before that was seen.
_LIMITS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.87, 0.95)
_AGREEING = (0.15, 0.25, 0.4, 0.5, 0.65, 0.75, 0.87, 0.95)
_ANY = -1  # the kind of a guess not made yet


class Chances:
    """How often guesses of a kind were right: for one sequence, beginning with what all had.

    priors: of each kind, before any was tried. rate: how quickly the latest guess changes them.
    """

    def __init__(self, priors: Mapping[int, float], rate: float = _RATE) -> None:
        self._rate = rate
        self._common = dict(priors)
        self._own: dict[tuple[int, int], float] = {}

    def of(self, sequence: Sequence, kind: int = 0) -> float:
        return self._own.get((sequence.id, kind), self._common[kind])

    def learn(self, sequence: Sequence, kinds: Seq[int], accepted: int) -> None:
        """kinds: of the guesses made, in their order."""
        for index, kind in enumerate(
            kinds[: accepted + 1]
        ):  # what follows a wrong one says nothing
            self.move(sequence, float(index < accepted), kind)

    def move(self, sequence: Sequence, towards: float, kind: int = 0) -> None:
        """towards: 1 for a guess that was right, 0 for one that was not."""
        chance, common = self.of(sequence, kind), self._common[kind]
        self._own[sequence.id, kind] = chance + self._rate * (towards - chance)
        self._common[kind] = common + self._rate / 8 * (towards - common)

    def forget(self, sequence: Sequence) -> None:
        for key in [key for key in self._own if key[0] == sequence.id]:
            del self._own[key]


@dataclass
class _Index:
    """Where each pair and triple of tokens last stood: the place after it."""

    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    tokens: int = 0  # of the sequence, in the index
    match: int = 0  # length of the match that the last guesses followed


class PromptLookup:
    """Guesses that what followed the last tokens before will follow them again.

    Saxena, "Prompt lookup decoding" (2023). Nothing to load, nothing to compute; good where the
    answer repeats the prompt: rewriting, code, quoting, extraction.
    """

    name = "ngram"
    row_cost = 0.0
    wants_states = False
    knows_chances = False

    def __init__(self) -> None:
        # By the length of the match: see _common_end.
        self._chances = Chances({2: 0.35, 3: 0.5, 4: 0.7, 8: 0.85})
        self._indices: dict[int, _Index] = {}

    def ready(self, sequence: Sequence) -> float | None:
        place = self._look_up(sequence)
        return None if place is None else self._chances.of(sequence, self._match(sequence))

    def propose(self, wishes: Seq[Wish]) -> list[list[int]]:
        return [self._continuation(wish.sequence, wish.most) for wish in wishes]

    def observe(self, sequence: Sequence, start: int, states: np.ndarray) -> None:
        """The text alone is looked at."""

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        self._chances.learn(sequence, [self._match(sequence)] * drafted, accepted)

    def forget(self, sequence: Sequence) -> None:
        self._indices.pop(sequence.id, None)
        self._chances.forget(sequence)

    def _match(self, sequence: Sequence) -> int:
        return self._indices[sequence.id].match

    def _continuation(self, sequence: Sequence, count: int) -> list[int]:
        place = self._look_up(sequence)
        if place is None:
            return []
        tokens = sequence.tokens
        guesses = list(tokens[place : place + count])
        while len(guesses) < count:  # it runs into the end: the text repeats itself
            guesses.append(guesses[place - len(tokens)])
        return guesses

    def _look_up(self, sequence: Sequence) -> int | None:
        """The place after the latest earlier occurrence of the last three or two tokens."""
        index = self._indices.setdefault(sequence.id, _Index())
        tokens = sequence.tokens
        for stop in range(max(2, index.tokens), len(tokens)):
            for length in (2, 3):
                if stop >= length:
                    index.places[tuple(tokens[stop - length : stop])] = stop
        index.tokens = len(tokens)
        for length in (3, 2):
            place = index.places.get(tuple(tokens[-length:]))
            if place is not None:
                index.match = self._common_end(tokens, place)
                return place
        return None

    @staticmethod
    def _common_end(tokens: list[int], place: int) -> int:
        """How many tokens before `place` equal the last ones; 2, 3, or 4 to 7 as 4, or 8."""
        length, end = 0, len(tokens)
        while length < min(8, place) and tokens[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        return length if length < 4 else length // 4 * 4


class _Surmising:
    """What drafters that compute have in common: what a guess costs, and how often those were right
    to which they gave about the same probability."""

    wants_states = False
    knows_chances = True

    def __init__(self, prior: float) -> None:
        """prior: the chance of a guess, before any was made."""
        self._cost = Recent()
        self._chances = Chances({_ANY: prior, **dict(enumerate(_AGREEING))}, _STEADY_RATE)
        self._kinds: dict[int, list[int]] = {}  # of each sequence's last guesses

    def observe(self, sequence: Sequence, start: int, states: np.ndarray) -> None:
        """The text alone is looked at."""

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        self._chances.learn(sequence, self._kinds.get(sequence.id, [])[:drafted], accepted)

    def forget(self, sequence: Sequence) -> None:
        self._chances.forget(sequence)
        self._kinds.pop(sequence.id, None)

    def _begin(self, wishes: Seq[Wish]) -> None:
        for wish in wishes:
            self._kinds[wish.sequence.id] = []

    def _take(self, wish: Wish, guesses: list[int], token: int, probability: float) -> bool:
        """Adds a guess, if the model is to check it. Whether to make another one."""
        sequence, kind = wish.sequence, bisect_right(_LIMITS, probability)
        chance = self._chances.of(sequence, kind)
        # All that are made count here; the rest are told by what became of them.
        self._chances.move(sequence, chance, _ANY)
        if not wish.worth.keep(chance):
            return False
        guesses.append(token)
        self._kinds[sequence.id].append(kind)
        return len(guesses) < wish.most and wish.worth.another(self._chances.of(sequence, _ANY))

    @property
    def row_cost(self) -> float:
        """Seconds that a guess takes."""
        return self._cost.median

    def _record_cost(self, seconds: float, made: int, caught_up: bool) -> None:
        """Of some guesses. caught_up: the first came with so much to catch up that it says only
        how long a guess takes at most."""
        each = seconds / made
        if not caught_up or each < self.row_cost:
            self._cost.record(each)


class _WithTable(Protocol):
    table: BlockTable


_Kept = TypeVar("_Kept", bound=_WithTable)


def _hold(
    cache: KvCache,
    kept: dict[int, _Kept],
    sequence: Sequence,
    start: int,
    stop: int,
    wishes: Seq[Wish],
) -> bool:
    """Positions start … stop - 1 of a sequence's table; others, by sequence in the order of `kept`,
    give theirs up for it if they wish nothing now."""
    wishing = {wish.sequence.id for wish in wishes}
    while not cache.hold(kept[sequence.id].table, start, stop):
        other = next((i for i in kept if i not in wishing), None)
        if other is None:
            return False
        cache.close(kept.pop(other).table)
    return True


@dataclass
class _Followed:
    """A sequence as the draft model has it."""

    table: BlockTable
    tokens: list[int] = field(default_factory=list)  # whose K and V stand in its cache


class DraftModel(_Surmising):
    """Guesses of a smaller model with the same vocabulary, drawn with the request's own noise.

    Leviathan et al., "Fast inference from transformers via speculative decoding" (2023), but for
    how guesses are accepted. Its backend has a KV pool of its own, used for nothing else.
    """

    name = "model"

    def __init__(self, backend: Backend) -> None:
        super().__init__(prior=0.6)
        self.backend = backend
        self._cache = KvCache(backend)
        self._followed: dict[int, _Followed] = {}  # least recently used first

    def ready(self, sequence: Sequence) -> float | None:
        stop = len(sequence.tokens) + MAX_DRAFTS + 1
        fits = stop <= self.backend.spec.context and self._cache.fits(stop, self.backend.step_rows)
        return self._chances.of(sequence, _ANY) if fits else None

    def propose(self, wishes: Seq[Wish]) -> list[list[int]]:
        """One guess after another, for all sequences together; each begins by catching up."""
        began, made = time.perf_counter(), 0
        self._begin(wishes)
        guesses: list[list[int]] = [[] for _ in wishes]
        samplers: list[Sampler | None] = [None] * len(wishes)
        rows_left, catching_up = self.backend.step_rows, 0
        active = []
        for index, (sequence, count, _) in enumerate(wishes):
            followed = self._follow(sequence)
            behind = len(sequence.tokens) - len(followed.tokens)
            rows = min(behind, rows_left)
            start = len(followed.tokens)
            if rows and _hold(
                self._cache, self._followed, sequence, start, start + rows + count, wishes
            ):
                rows_left -= rows
                catching_up += rows
                active.append((index, rows))
        while active:
            chunks = []
            for index, rows in active:
                sequence = wishes[index].sequence
                followed = self._followed[sequence.id]
                known = (*sequence.tokens, *guesses[index])
                start = len(followed.tokens)
                followed.tokens.extend(known[start : start + rows])
                whole = len(followed.tokens) == len(known)
                chunks.append(
                    Chunk(
                        np.array(known[start : start + rows], np.int32),
                        start,
                        self._cache.block_table(followed.table),
                        (rows - 1,) if whole else (),
                        sequence.prompt_length,
                    )
                )
            try:
                logits = self.backend.forward(Batch(tuple(chunks)))
            except Exception as error:
                for (index, _), chunk in zip(active, chunks, strict=True):
                    del self._followed[wishes[index].sequence.id].tokens[chunk.start :]
                if isinstance(error, StepCancelled):
                    return guesses
                raise
            drawing = [index for (index, _), c in zip(active, chunks, strict=True) if c.logit_rows]
            for index in drawing:
                samplers[index] = samplers[index] or wishes[index].sequence.sampler.fork()
            drawers = [sampler for i in drawing if (sampler := samplers[i]) is not None]
            places = [len(wishes[i].sequence.tokens) + len(guesses[i]) for i in drawing]
            draws = draw_batch(drawers, logits, places)
            made += len(draws)
            active = []
            for index, draw, row in zip(drawing, draws, logits, strict=True):
                if isinstance(draw, Exception):
                    continue
                token = draw.token_id
                if self._take(wishes[index], guesses[index], token, _probability(row, token)):
                    active.append((index, 1))
        if made:
            caught_up = catching_up > 2 * MAX_DRAFTS * len(wishes)
            self._record_cost(time.perf_counter() - began, made, caught_up)
        return guesses

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        followed = self._followed.pop(sequence.id, None)
        if followed is not None:
            self._cache.close(followed.table)

    def _follow(self, sequence: Sequence) -> _Followed:
        """What the draft model has of the sequence, its wrong guesses cut off."""
        followed = self._followed.pop(sequence.id, None)
        if followed is None:
            table = self._cache.open(b"draft")
            hit = self._cache.reuse(table, sequence.tokens, len(sequence.tokens) - 1)
            followed = _Followed(table, list(sequence.tokens[: hit.tokens]))
        self._followed[sequence.id] = followed
        own, tokens = followed.tokens, sequence.tokens
        same = min(len(own), len(tokens) - 1)
        while same and own[same - 1] != tokens[same - 1]:  # only guesses can differ
            same -= 1
        del own[same:]
        self._cache.advance(followed.table, own, same)
        return followed


@dataclass
class _Watched:
    """A sequence as the head's layer has it: from the position `first` on, states up to `stop` in
    its cache, later ones still to be taken there."""

    table: BlockTable
    first: int
    stop: int
    waiting: list[np.ndarray] = field(default_factory=list)  # float32 [n, hidden] each

    @property
    def known(self) -> int:
        """The first position whose state is not known."""
        return self.stop + sum(map(len, self.waiting))


class HeadDrafter(_Surmising):
    """Guesses of a draft head (see `localllm.models.draft_head`).

    Its layer has a KV pool of its own. What it sees of a sequence begins with the last `_WINDOW`
    positions that the model computed before the first guess: a prompt whose K and V were reused
    has no hidden states.
    """

    name = "head"
    wants_states = True

    def __init__(
        self, head: DraftHead, backend: Backend, layer: Backend, rows: Tensor | None = None
    ) -> None:
        """backend: the model. layer: `head.spec` with `head.weights`. rows: [M, hidden], those of
        the model's head that stand for `head.tokens`."""
        super().__init__(prior=0.6)
        # Not the head itself: its weights are the layer's now.
        self._tokens, self._vocab_size = head.tokens, backend.spec.vocab_size
        self._layer = layer
        self._cache = KvCache(layer)
        self._network = head_network(head, backend, layer, rows)
        self._watched: dict[int, _Watched] = {}  # least recently used first

    def observe(self, sequence: Sequence, start: int, states: np.ndarray) -> None:
        watched = self._watched.pop(sequence.id, None)
        if watched is not None and watched.known != start:
            self._cache.close(watched.table)  # it was preempted, or others' guesses went between
            watched = None
        if watched is None:
            watched = _Watched(self._cache.open(b"head"), start, start)
        watched.waiting.append(states)
        if watched.known - watched.stop > _WINDOW:
            self._cache.close(watched.table)
            recent = np.concatenate(watched.waiting)[-_WINDOW:]
            first = watched.known - len(recent)
            watched = _Watched(self._cache.open(b"head"), first, first, [recent])
        self._watched[sequence.id] = watched

    def ready(self, sequence: Sequence) -> float | None:
        watched = self._watched.get(sequence.id)
        if watched is None or watched.known != len(sequence.tokens) - 1 or not watched.waiting:
            return None
        stop = watched.known - watched.first + MAX_DRAFTS
        fits = stop <= self._layer.spec.context and self._cache.fits(stop, self._layer.step_rows)
        return self._chances.of(sequence, _ANY) if fits else None

    def propose(self, wishes: Seq[Wish]) -> list[list[int]]:
        """One guess after another, for all sequences together; each begins by catching up."""
        began, made = time.perf_counter(), 0
        self._begin(wishes)
        guesses: list[list[int]] = [[] for _ in wishes]
        samplers = [None if (s := w.sequence.sampler).plain else s.fork() for w in wishes]
        rows_left, behind = self._layer.step_rows, 0
        active: list[int] = []
        rows: list[HeadRows] = []
        for index, (sequence, most, _) in enumerate(wishes):
            watched = self._watched.pop(sequence.id)
            self._watched[sequence.id] = watched
            states = np.concatenate(watched.waiting)
            start, stop = watched.stop - watched.first, watched.known - watched.first
            if len(states) <= rows_left and _hold(
                self._cache, self._watched, sequence, start, stop + most - 1, wishes
            ):
                rows_left -= len(states)
                behind += len(states)
                active.append(index)
                following = sequence.tokens[watched.stop + 1 : watched.known + 1]
                rows.append(self._rows(sequence, watched, watched.stop, states, following))
        while active:
            states, logits = self._network.run(rows)
            if not made:
                for index, new in zip(active, rows, strict=True):
                    watched = self._watched[wishes[index].sequence.id]
                    watched.stop += len(new.states)
                    watched.waiting.clear()
            made += len(active)
            drawn = self._draw(
                [samplers[i] for i in active],
                logits,
                [len(wishes[i].sequence.tokens) + len(guesses[i]) for i in active],
            )
            going_on, rows = [], []
            for row, (index, draw) in enumerate(zip(active, drawn, strict=True)):
                if draw is None or not self._take(wishes[index], guesses[index], *draw):
                    continue
                sequence = wishes[index].sequence
                watched = self._watched[sequence.id]
                at = watched.stop + len(guesses[index]) - 1
                rows.append(self._rows(sequence, watched, at, states[row : row + 1], draw[:1]))
                going_on.append(index)
            active = going_on
        if made:
            caught_up = behind > 2 * MAX_DRAFTS * len(wishes)
            self._record_cost(time.perf_counter() - began, made, caught_up)
        return guesses

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        watched = self._watched.pop(sequence.id, None)
        if watched is not None:
            self._cache.close(watched.table)

    def _rows(
        self,
        sequence: Sequence,
        watched: _Watched,
        position: int,
        states: np.ndarray,
        following: Seq[int],
    ) -> HeadRows:
        """states: float32 [n, hidden], from `position` on. following: each one's next token."""
        return HeadRows(
            states,
            following,
            position - watched.first,
            self._cache.block_table(watched.table),
            sequence.prompt_length,
        )

    def _draw(
        self, samplers: Seq[Sampler | None], logits: np.ndarray, places: Seq[int]
    ) -> list[tuple[int, float] | None]:
        """Of each row the token and its probability; None where none can be drawn.

        samplers: None for one that takes the likeliest. logits: float32 [n, M].
        """
        best: list[int | None] = logits.argmax(axis=1).tolist()
        others = [i for i, sampler in enumerate(samplers) if sampler is not None]
        if others:
            drawers = [sampler for sampler in samplers if sampler is not None]
            spread = self._spread(logits[others])
            draws = draw_batch(drawers, spread, [places[i] for i in others])
            for i, draw in zip(others, draws, strict=True):
                best[i] = None if isinstance(draw, Exception) else self._place(draw.token_id)
        drawn: list[tuple[int, float] | None] = []
        for row, place in zip(logits, best, strict=True):
            probability = math.nan if place is None else _probability(row, place)
            if place is None or not math.isfinite(probability):
                drawn.append(None)
            else:
                token = place if self._tokens is None else int(self._tokens[place])
                drawn.append((token, probability))
        return drawn

    def _spread(self, logits: np.ndarray) -> np.ndarray:
        """float32 [n, vocab_size]; tokens that it never guesses have no chance."""
        if self._tokens is None:
            return logits
        whole = np.full((len(logits), self._vocab_size), -np.inf, np.float32)
        whole[:, self._tokens] = logits
        return whole

    def _place(self, token: int) -> int:
        return token if self._tokens is None else int(np.searchsorted(self._tokens, token))


def _probability(logits: np.ndarray, index: int) -> float:
    """Of one of these tokens, at temperature 1."""
    with np.errstate(invalid="ignore", over="ignore"):
        return 1.0 / float(np.exp(logits - logits[index]).sum())
