"""Where guesses come from: the text so far, a smaller model, or a head over the hidden states."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from localllm.backend.protocol import Backend, Batch, Chunk, StepCancelled
from localllm.checkpoint.tensor import Tensor
from localllm.engine.kv_cache import BlockTable, KvCache
from localllm.engine.sequence import Sequence
from localllm.engine.speculative import MAX_DRAFTS
from localllm.models.draft_head import DraftHead
from localllm.sampling import Sampler, draw_batch

_RATE = 0.2  # how quickly the latest guess changes a chance
_STEADY_RATE = 0.08  # of drafters that know the language: a few misses in a row say little
_WINDOW = 512  # hidden states of a sequence that wait for the first guess, at most


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

    def learn(self, sequence: Sequence, drafted: int, accepted: int, kind: int = 0) -> None:
        chance, common = self.of(sequence, kind), self._common[kind]
        for index in range(min(drafted, accepted + 1)):  # what follows a wrong one says nothing
            right = float(index < accepted)
            chance += self._rate * (right - chance)
            common += self._rate / 8 * (right - common)
        self._own[sequence.id, kind] = chance
        self._common[kind] = common

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

    def __init__(self) -> None:
        # By the length of the match: see _common_end.
        self._chances = Chances({2: 0.35, 3: 0.5, 4: 0.7, 8: 0.85})
        self._indices: dict[int, _Index] = {}

    def ready(self, sequence: Sequence) -> float | None:
        place = self._look_up(sequence)
        return None if place is None else self._chances.of(sequence, self._match(sequence))

    def propose(self, wishes: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        return [self._continuation(sequence, count) for sequence, count in wishes]

    def observe(self, sequence: Sequence, start: int, states: np.ndarray) -> None:
        """The text alone is looked at."""

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        self._chances.learn(sequence, drafted, accepted, self._match(sequence))

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


class _Timed:
    """What drafters that compute have in common: chances by sequence, and what a guess costs."""

    wants_states = False

    def __init__(self, prior: float) -> None:
        self.row_cost = 0.0
        self._chances = Chances({0: prior}, _STEADY_RATE)

    def observe(self, sequence: Sequence, start: int, states: np.ndarray) -> None:
        """The text alone is looked at."""

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        self._chances.learn(sequence, drafted, accepted)

    def forget(self, sequence: Sequence) -> None:
        self._chances.forget(sequence)

    def _record_cost(self, began: float, guesses: Seq[Seq[int]]) -> None:
        cost = (time.perf_counter() - began) / max(1, sum(map(len, guesses)))
        self.row_cost += _RATE * (cost - self.row_cost) if self.row_cost else cost


class _WithTable(Protocol):
    table: BlockTable


_Kept = TypeVar("_Kept", bound=_WithTable)


def _hold(
    cache: KvCache,
    kept: dict[int, _Kept],
    sequence: Sequence,
    start: int,
    stop: int,
    wishes: Seq[tuple[Sequence, int]],
) -> bool:
    """Positions start … stop - 1 of a sequence's table; others, by sequence in the order of `kept`,
    give theirs up for it if they wish nothing now."""
    wishing = {sequence.id for sequence, _ in wishes}
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


class DraftModel(_Timed):
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
        return self._chances.of(sequence) if fits else None

    def propose(self, wishes: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        """One guess after another, for all sequences together; each begins by catching up."""
        began, steps = time.perf_counter(), 0
        guesses: list[list[int]] = [[] for _ in wishes]
        samplers: list[Sampler | None] = [None] * len(wishes)
        rows_left = self.backend.step_rows
        active = []
        for index, (sequence, count) in enumerate(wishes):
            followed = self._follow(sequence)
            behind = len(sequence.tokens) - len(followed.tokens)
            rows = min(behind, rows_left)
            start = len(followed.tokens)
            if rows and _hold(
                self._cache, self._followed, sequence, start, start + rows + count, wishes
            ):
                rows_left -= rows
                active.append((index, rows))
        while active:
            chunks = []
            for index, rows in active:
                sequence, count = wishes[index]
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
                    del self._followed[wishes[index][0].id].tokens[chunk.start :]
                if isinstance(error, StepCancelled):
                    return guesses
                raise
            steps += 1
            drawing = [index for (index, _), c in zip(active, chunks, strict=True) if c.logit_rows]
            for index in drawing:
                samplers[index] = samplers[index] or wishes[index][0].sampler.fork()
            drawers = [sampler for i in drawing if (sampler := samplers[i]) is not None]
            places = [len(wishes[i][0].tokens) + len(guesses[i]) for i in drawing]
            draws = draw_batch(drawers, logits, places)
            active = []
            for index, draw in zip(drawing, draws, strict=True):
                if isinstance(draw, Exception):
                    continue
                guesses[index].append(draw.token_id)
                if len(guesses[index]) < wishes[index][1]:
                    active.append((index, 1))
        if steps:
            self._record_cost(began, guesses)
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


class HeadDrafter(_Timed):
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
        assert (rows is None) == (head.tokens is None)
        # Not the head itself: its weights are the layer's now.
        self._eps, self._tokens = head.spec.layers[0].norm.eps, head.tokens
        self._norms = head.hidden_norm, head.embedding_norm
        self._backend = backend
        self._layer = layer
        self._cache = KvCache(layer)
        self._from_hidden = layer.part_of_head(head.from_hidden)
        self._from_embedding = layer.part_of_head(head.from_embedding)
        self._part = None if rows is None else backend.part_of_head(rows)
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
        return self._chances.of(sequence) if fits else None

    def propose(self, wishes: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        """One guess after another, for all sequences together; each begins by catching up."""
        began = time.perf_counter()
        guesses: list[list[int]] = [[] for _ in wishes]
        samplers = [sequence.sampler.fork() for sequence, _ in wishes]
        rows_left, behind, active, chunks = self._layer.step_rows, 0, [], []
        for index, (sequence, count) in enumerate(wishes):
            watched = self._watched.pop(sequence.id)
            self._watched[sequence.id] = watched
            states = np.concatenate(watched.waiting)
            start, stop = watched.stop - watched.first, watched.known - watched.first
            if len(states) <= rows_left and _hold(
                self._cache, self._watched, sequence, start, stop + count - 1, wishes
            ):
                rows_left -= len(states)
                behind += len(states)
                active.append(index)
                following = sequence.tokens[watched.stop + 1 : watched.known + 1]
                chunks.append(self._chunk(sequence, watched, watched.stop, states, following))
        states = self._run(chunks)
        for index, chunk in zip(active, chunks, strict=True):
            watched = self._watched[wishes[index][0].id]
            watched.stop += len(chunk.token_ids)
            watched.waiting.clear()
        while active:
            places = [len(wishes[i][0].tokens) + len(guesses[i]) for i in active]
            draws = draw_batch([samplers[i] for i in active], self._logits(states), places)
            going_on, chunks = [], []
            for row, (index, draw) in enumerate(zip(active, draws, strict=True)):
                if isinstance(draw, Exception):
                    continue
                sequence, count = wishes[index]
                guesses[index].append(draw.token_id)
                if len(guesses[index]) < count:
                    watched = self._watched[sequence.id]
                    at = watched.stop + len(guesses[index]) - 1
                    state = states[row : row + 1]
                    chunks.append(self._chunk(sequence, watched, at, state, [draw.token_id]))
                    going_on.append(index)
            active = going_on
            states = self._run(chunks)
        if behind <= 2 * MAX_DRAFTS * len(wishes):  # else it is not what a guess usually takes
            self._record_cost(began, guesses)
        return guesses

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        watched = self._watched.pop(sequence.id, None)
        if watched is not None:
            self._cache.close(watched.table)

    def _chunk(
        self,
        sequence: Sequence,
        watched: _Watched,
        position: int,
        states: np.ndarray,
        following: Seq[int],
    ) -> Chunk:
        """states: float32 [n, hidden], from `position` on. following: each one's next token."""
        hidden_norm, embedding_norm = self._norms
        hidden = _rms_norm(states, hidden_norm, self._eps)
        embedding = _rms_norm(self._backend.embed(following), embedding_norm, self._eps)
        return Chunk(
            np.zeros(len(states), np.int32),
            position - watched.first,
            self._cache.block_table(watched.table),
            (),
            sequence.prompt_length,
            embeddings=self._from_hidden(hidden) + self._from_embedding(embedding),
        )

    def _run(self, chunks: Seq[Chunk]) -> np.ndarray:
        """float32 [chunks, hidden]: the states that the last row of each guesses."""
        counts = [len(chunk.token_ids) for chunk in chunks]
        hidden = np.empty((sum(counts), self._layer.spec.hidden), np.float32)
        if chunks:
            self._layer.forward(Batch(tuple(chunks)), hidden)
        last: np.ndarray = hidden[np.cumsum(counts, dtype=np.int64) - 1]
        return last

    def _logits(self, states: np.ndarray) -> np.ndarray:
        """float32 [n, vocab_size]; tokens that it never guesses have none."""
        if self._part is None:
            return self._backend.project(states)
        logits = np.full((len(states), self._backend.spec.vocab_size), -np.inf, np.float32)
        logits[:, self._tokens] = self._part(states)
        return logits


def _rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    scaled: np.ndarray = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + eps) * gain
    return scaled.astype(np.float32)
