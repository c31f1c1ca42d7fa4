"""One request's sampler: logits in, a token and its log-probability out."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localllm.errors import LocalLLMError
from localllm.sampling import processors
from localllm.sampling.noise import gumbel
from localllm.sampling.params import SamplingParams


@dataclass(frozen=True)
class Draw:
    """A drawn token. `logprob` and `top` ((id, logprob), likeliest first) only when asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws tokens for one request by Gumbel-max, with noise keyed by seed and position.

    argmax(logits / T + Gumbel noise) has exactly the softmax distribution, and the draw at a
    position depends on nothing but the logits, the seed and the position.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        stop_ids: frozenset[int],
    ) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else int(params.seed)
        self._vocab_size = vocab_size
        self._stop_ids = np.array(sorted(i for i in stop_ids if i < vocab_size), dtype=np.int64)
        self._prompt_ids = np.unique(np.asarray(prompt, dtype=np.int64))
        self._unchanged = not (
            params.logit_bias
            or params.repetition_penalty != 1.0
            or params.presence_penalty
            or params.frequency_penalty
            or params.min_tokens
        )
        self._counts: Counter[int] = Counter()
        self._drawn = 0

    def draw(self, logits: np.ndarray, position: int) -> Draw:
        """`logits`: float32 [V] for the token that will stand at `position`; left unchanged."""
        plain = self.params.greedy and self._unchanged
        changed = logits if plain else self._processed(logits)
        if not np.isfinite(changed.max()):
            raise LocalLLMError(
                f"no token can be drawn at position {position}: "
                "the logits are NaN, infinite or banned"
            )
        if self.params.greedy:
            token_id = int(np.argmax(changed))
        else:
            token_id = self._sample(changed, position)
        self._counts[token_id] += 1
        self._drawn += 1
        if self.params.logprobs is None:
            return Draw(token_id)
        return self._with_logprobs(token_id, logits)

    def _processed(self, logits: np.ndarray) -> np.ndarray:
        params = self.params
        changed = logits.astype(np.float64)
        if params.logit_bias:
            processors.add_bias(changed, params.logit_bias)
        if params.repetition_penalty != 1.0:
            answer = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
            seen = np.union1d(self._prompt_ids, answer)
            processors.penalize_repetition(changed, seen, params.repetition_penalty)
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            processors.penalize_presence(
                changed, self._counts, params.presence_penalty, params.frequency_penalty
            )
        if self._drawn < params.min_tokens:
            changed[self._stop_ids] = -np.inf
        return changed

    def _sample(self, changed: np.ndarray, position: int) -> int:
        params = self.params
        # Only differences matter; shifting first keeps tiny temperatures from overflowing.
        scaled = (changed - changed.max()) / params.temperature
        ids = processors.candidates(scaled, params.top_k, params.top_p, params.min_p)
        return int(ids[np.argmax(scaled[ids] + gumbel(self.seed, position, ids))])

    def _with_logprobs(self, token_id: int, logits: np.ndarray) -> Draw:
        logprobs = processors.log_softmax(logits.astype(np.float64))
        count = min(self.params.logprobs or 0, self._vocab_size)
        best = np.argsort(-logprobs, kind="stable")[:count] if count else ()
        top = tuple((int(i), float(logprobs[i])) for i in best)
        return Draw(token_id, float(logprobs[token_id]), top)
