"""Changes to single logits before anything is filtered: bias, penalties, stop ids not yet due.

They touch few tokens of a large vocabulary: those that were named or have been seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from localllm.sampling.dry import Repetitions
from localllm.sampling.params import SamplingParams

_MOST_EXPONENT = math.log(1e38)  # where DRY's power stops growing


class Penalties:
    """What one request's parameters and tokens so far do to the logits.

    Every token touched has a slot; columns hold what is known of it. The prompt's part of the
    index is shared between copies.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], stop_ids: Sequence[int]
    ) -> None:
        self._params = params
        self._repetition = params.repetition_penalty != 1.0
        self._frequency = bool(params.presence_penalty or params.frequency_penalty)
        self._dry: Repetitions | None = None
        if params.dry_multiplier:
            breakers = frozenset(b for b in params.dry_sequence_breakers if isinstance(b, int))
            self._dry = Repetitions(prompt, breakers, params.dry_range)
        self._counts_tokens = self._repetition or self._frequency or self._dry is not None
        seen = set(prompt) if self._repetition or self._dry is not None else set()
        stops = set(stop_ids) if params.min_tokens else set()
        first = sorted(seen | stops | params.logit_bias.keys())
        self.active = bool(first) or self._counts_tokens
        self._slots = {token: slot for slot, token in enumerate(first)}  # shared, never changed
        self._new_slots: dict[int, int] = {}
        size = len(first)
        self._used = size
        self._ids = np.array(first, dtype=np.int64)
        self._bias = np.array([params.logit_bias.get(t, 0.0) for t in first], dtype=np.float64)
        self._seen = np.array([t in seen for t in first], dtype=bool)
        self._stops = np.array([t in stops for t in first], dtype=bool)
        self._counts = np.zeros(size, dtype=np.float64)

    def copy(self) -> Penalties:
        other = Penalties.__new__(Penalties)
        other.__dict__.update(self.__dict__)
        if self._counts_tokens:
            other._new_slots = dict(self._new_slots)
            for column in ("_ids", "_bias", "_seen", "_stops", "_counts"):
                setattr(other, column, getattr(self, column).copy())
            other._dry = None if self._dry is None else self._dry.copy()
        return other

    def append(self, token: int) -> None:
        """Takes a token of the answer."""
        if not self._counts_tokens:
            return
        slot = self._slot(token)
        self._seen[slot] = True
        self._counts[slot] += 1.0
        if self._dry is not None:
            self._dry.append(token)

    def edits(self, logits: np.ndarray, answered: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, none twice, and their changed logits in float64.

        answered: how many tokens of the answer there are.
        """
        params, used = self._params, self._used
        ids = self._ids[:used]
        values = logits[ids].astype(np.float64)
        if params.logit_bias:
            with np.errstate(invalid="ignore"):  # a ban on a broken logit leaves it broken
                values += self._bias[:used]
        if self._repetition:
            penalty = params.repetition_penalty
            penalized = np.where(values > 0, values / penalty, values * penalty)
            values = np.where(self._seen[:used], penalized, values)
        if self._frequency:
            counts = self._counts[:used]
            taken = params.presence_penalty + params.frequency_penalty * counts
            values -= np.where(counts > 0, taken, 0.0)
        if self._dry is not None:
            repeated, lengths = self._dry.prolonging(params.dry_allowed_length)
            if len(repeated):
                slots = [self._slot(token) for token in repeated.tolist()]
                values[slots] -= self._dry_penalty(lengths)
        if answered < params.min_tokens:
            values[self._stops[:used]] = -np.inf
        return ids, values

    def _dry_penalty(self, lengths: np.ndarray) -> np.ndarray:
        params = self._params
        exponents = (lengths - params.dry_allowed_length).astype(np.float64)
        if params.dry_base > 1.0:
            exponents = np.minimum(exponents, _MOST_EXPONENT / math.log(params.dry_base))
        penalty: np.ndarray = params.dry_multiplier * params.dry_base**exponents
        return penalty

    def _slot(self, token: int) -> int:
        slot = self._slots.get(token)
        if slot is None:
            slot = self._new_slots.get(token)
        if slot is None:
            slot = self._new_slots[token] = self._used
            if slot == len(self._ids):
                self._grow(max(64, slot))
            self._ids[slot] = token
            self._used += 1
        return slot

    def _grow(self, more: int) -> None:
        for column in ("_ids", "_bias", "_seen", "_stops", "_counts"):
            old = getattr(self, column)
            setattr(self, column, np.concatenate([old, np.zeros(more, dtype=old.dtype)]))
