"""Beam search: the most likely continuations, kept side by side as forks of one sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from localllm.engine.sequence import Sequence
from localllm.errors import LocalLLMError
from localllm.sampling import Draw, log_softmax, logprobs_of


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation. score: sum of log-probabilities / length ** length_penalty."""

    draws: tuple[Draw, ...]
    score: float
    by: str


@dataclass
class Beam:
    """A live continuation. draws: its tokens. total: the sum of their log-probabilities."""

    sequence: Sequence
    draws: tuple[Draw, ...] = ()
    total: float = 0.0


@dataclass(frozen=True)
class Extension:
    """The beam that follows from `parent` by one token; total: with that token's."""

    parent: Beam
    draw: Draw
    total: float


class BeamSearch:
    """The search of one request. Of equally good extensions the earlier beam, the lower id wins.

    As transformers does: of the best 2 · beams extensions those that end are hypotheses if they
    are among the best `beams`, and the first `beams` of the others live on. The search is over
    when no live beam could still beat the worst hypothesis kept.

    Probabilities are those after bias, penalties and `min_tokens`, which a sampled answer would be
    drawn from; draws tell the model's own, as everywhere.
    """

    def __init__(self, sequence: Sequence, beams: int) -> None:
        self.owner = sequence
        self.width = beams
        self.request_ids: list[int] = []  # that await the results, the best first
        self.live = [Beam(sequence)]
        self.finished: list[Hypothesis] = []
        self._logits: dict[int, np.ndarray] = {}
        self._rows: dict[int, np.ndarray] = {}

    def offer(self, sequence: Sequence, logits: np.ndarray) -> bool:
        """The logits after a live beam's tokens; True when those of all are here.

        Raises `LocalLLMError` if they are broken.
        """
        changed = sequence.sampler.changes(logits).applied(logits)
        if not np.isfinite(changed.max()):
            raise LocalLLMError("no beam can go on: the logits are NaN, infinite or banned")
        self._logits[sequence.id] = logits.copy()
        self._rows[sequence.id] = log_softmax(changed)
        sequence.resting = True
        return len(self._rows) == len(self.live)

    def extend(self) -> list[Extension]:
        """The beams that live on; none when the search is over."""
        candidates = self._candidates()
        stop_ids = self.owner.request.stop_ids
        length = len(self.live[0].draws) + 1
        full = self.owner.prompt_length + length >= self.owner.limit
        chosen: list[Extension] = []
        for rank, candidate in enumerate(candidates):
            if candidate.draw.token_id in stop_ids:
                if rank < self.width:
                    eos = candidate.draw.token_id in self.owner.request.eos_ids
                    self._finish(candidate, "eos" if eos else "stop token", emit=False)
            elif len(chosen) < self.width:
                chosen.append(candidate)
        if full:
            asked = self.owner.request.params.max_tokens
            by = "max_tokens" if asked == length else "context"
            for candidate in chosen:
                self._finish(candidate, by, emit=True)
            return []
        best = max((candidate.total for candidate in chosen), default=-np.inf)
        if len(self.finished) >= self.width and self._worst() >= self._score(best, length):
            return []
        self._logits.clear()
        self._rows.clear()
        for beam in self.live:
            beam.sequence.resting = False
        return chosen

    def results(self) -> list[Hypothesis]:
        """The best first."""
        return sorted(self.finished, key=lambda h: -h.score)

    def _candidates(self) -> list[Extension]:
        found: list[tuple[float, int, int]] = []
        for index, beam in enumerate(self.live):
            row = self._rows[beam.sequence.id]
            count = min(2 * self.width, len(row))
            ids = np.argpartition(-row, count - 1)[:count]
            found += [(-(beam.total + float(row[i])), index, int(i)) for i in ids]
        found = [candidate for candidate in sorted(found) if candidate[0] < np.inf]
        return [
            Extension(self.live[index], self._draw(self.live[index], token), -negative)
            for negative, index, token in found[: 2 * self.width]
        ]

    def _draw(self, beam: Beam, token: int) -> Draw:
        asked = self.owner.request.params.logprobs
        if asked is None:
            return Draw(token)
        return logprobs_of(self._logits[beam.sequence.id], token, asked)

    def _finish(self, candidate: Extension, by: str, *, emit: bool) -> None:
        """emit: a token that ends the answer is not part of it, but counts."""
        draws = candidate.parent.draws
        score = self._score(candidate.total, len(draws) + 1)
        self.finished.append(Hypothesis((*draws, candidate.draw) if emit else draws, score, by))
        if len(self.finished) > self.width:
            self.finished.remove(min(self.finished, key=lambda h: h.score))

    def _worst(self) -> float:
        return min(h.score for h in self.finished)

    def _score(self, total: float, length: int) -> float:
        return float(total / length**self.owner.request.params.length_penalty)
