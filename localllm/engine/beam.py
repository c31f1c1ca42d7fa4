"""Beam search: the most likely continuations, kept side by side as forks of one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from localllm.engine.sequence import Sequence
from localllm.sampling import Draw, log_softmax


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation. score: sum of log-probabilities / length ** length_penalty."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float
    by: str


@dataclass
class Beam:
    """A live continuation. logprobs: of its tokens, one each."""

    sequence: Sequence
    logprobs: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@dataclass(frozen=True)
class Extension:
    """The beam that follows from `parent` by one token."""

    parent: Beam
    token_id: int
    logprob: float


class BeamSearch:
    """The search of one request. Of equally good extensions the earlier beam, the lower id wins.

    As transformers does: of the best 2 · beams extensions those that end are hypotheses if they
    are among the best `beams`, and the first `beams` of the others live on. The search is over
    when no live beam could still beat the worst hypothesis kept.
    """

    def __init__(self, sequence: Sequence, beams: int) -> None:
        self.owner = sequence
        self.width = beams
        self.request_ids: list[int] = []  # that await the results, the best first
        self.live = [Beam(sequence)]
        self.finished: list[Hypothesis] = []
        self._rows: dict[int, np.ndarray] = {}

    def offer(self, sequence: Sequence, logits: np.ndarray) -> bool:
        """The logits after a live beam's tokens; True when those of all are here."""
        self._rows[sequence.id] = log_softmax(logits.astype(np.float64))
        return len(self._rows) == len(self.live)

    def extend(self) -> list[Extension]:
        """The beams that live on; none when the search is over."""
        candidates = self._candidates()
        stop_ids = self.owner.request.stop_ids
        length = len(self.live[0].logprobs) + 1
        full = self.owner.prompt_length + length >= self.owner.limit
        chosen: list[Extension] = []
        for rank, candidate in enumerate(candidates):
            if candidate.token_id in stop_ids:
                if rank < self.width:
                    eos = candidate.token_id in self.owner.request.eos_ids
                    self._finish(candidate, "eos" if eos else "stop token", emit=False)
            elif len(chosen) < self.width:
                chosen.append(candidate)
        if full:
            asked = self.owner.request.params.max_tokens
            by = "max_tokens" if asked == length else "context"
            for candidate in chosen:
                self._finish(candidate, by, emit=True)
            return []
        best = max((c.parent.total + c.logprob for c in chosen), default=-np.inf)
        if len(self.finished) >= self.width and self._worst() >= self._score(best, length):
            return []
        self._rows.clear()
        return chosen

    def results(self) -> list[Hypothesis]:
        """The best first."""
        return sorted(self.finished, key=lambda h: -h.score)

    def draws(self, hypothesis: Hypothesis) -> list[Draw]:
        keep = self.owner.request.params.logprobs is not None
        return [
            Draw(token, logprob if keep else None)
            for token, logprob in zip(hypothesis.tokens, hypothesis.logprobs, strict=True)
        ]

    def _candidates(self) -> list[Extension]:
        found: list[tuple[float, int, int]] = []
        for index, beam in enumerate(self.live):
            row = self._rows[beam.sequence.id]
            count = min(2 * self.width, len(row))
            ids = np.argpartition(-row, count - 1)[:count]
            found += [(-(beam.total + float(row[i])), index, int(i)) for i in ids]
        found.sort()
        return [
            Extension(
                self.live[index],
                token,
                float(self._rows[self.live[index].sequence.id][token]),
            )
            for _, index, token in found[: 2 * self.width]
        ]

    def _finish(self, candidate: Extension, by: str, *, emit: bool) -> None:
        beam = candidate.parent
        start = self.owner.prompt_length
        tokens = tuple(beam.sequence.tokens[start:])
        logprobs = tuple(beam.logprobs)
        length = len(tokens) + 1
        score = self._score(beam.total + candidate.logprob, length)
        if emit:  # a token that ends the answer is not part of it
            tokens, logprobs = (*tokens, candidate.token_id), (*logprobs, candidate.logprob)
        self.finished.append(Hypothesis(tokens, logprobs, score, by))
        if len(self.finished) > self.width:
            self.finished.remove(min(self.finished, key=lambda h: h.score))

    def _worst(self) -> float:
        return min(h.score for h in self.finished)

    def _score(self, total: float, length: int) -> float:
        return float(total / length**self.owner.request.params.length_penalty)
