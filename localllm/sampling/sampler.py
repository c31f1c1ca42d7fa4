"""One request's sampler: logits in, a token and its log-probability out."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localllm.errors import LocalLLMError
from localllm.sampling import processors
from localllm.sampling.constraints import Constraint
from localllm.sampling.noise import coin, gumbel
from localllm.sampling.params import SamplingParams
from localllm.sampling.penalties import Penalties


@dataclass(frozen=True)
class Draw:
    """A drawn token. `logprob` and `top` ((id, logprob), likeliest first) only when asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RowChanges:
    """What a row's logits become before temperature: `values` at `ids`, and only `allowed` tokens.

    allowed: uint32 [ceil(V / 32)], a bit for every token; None: all are.
    """

    ids: np.ndarray
    values: np.ndarray
    allowed: np.ndarray | None

    def applied(self, logits: np.ndarray) -> np.ndarray:
        """float64 [V]."""
        changed = logits.astype(np.float64)
        changed[self.ids] = self.values
        if self.allowed is not None:
            bits = np.unpackbits(self.allowed.view(np.uint8), bitorder="little")
            changed[bits[: len(changed)] == 0] = -np.inf
        return changed


@dataclass(frozen=True)
class NativeWish:
    """What the native module can do of a request's sampling.

    settings: temperature, top_k, top_p, log(min_p). only_cut: it leaves few tokens, by top_k or
    min_p, and the rest is done here; otherwise it names the token.
    """

    settings: tuple[float, float, float, float]
    only_cut: bool

    @staticmethod
    def of(params: SamplingParams, vocab_size: int) -> NativeWish | None:
        """None if it can do nothing: what depends on the whole distribution in rarer ways."""
        if not params.greedy and (
            params.dynatemp_range or params.top_n_sigma > 0.0 or params.mirostat
        ):
            return None
        rarer = not params.greedy and bool(params.typical_p < 1.0 or params.xtc_probability)
        by_min_p = params.min_p > 0.0 and params.top_p == 1.0 and params.typical_p == 1.0
        if rarer and not (params.top_k > 0 or by_min_p):
            return None
        floor = float(np.log(params.min_p)) if params.min_p else -np.inf
        top_k = float(min(max(params.top_k, 0), vocab_size))
        settings = (float(params.temperature), top_k, float(params.top_p), floor)
        return NativeWish(settings, rarer)


_NO_IDS, _NO_VALUES = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float64)
_UNCHANGED = RowChanges(_NO_IDS, _NO_VALUES, None)


class Sampler:
    """Draws tokens for one request by Gumbel-max, with noise keyed by seed and position.

    argmax(logits / T + Gumbel noise) has exactly the softmax distribution, and the draw at a
    position depends on nothing but the logits, the seed, the position and the tokens so far.

    constraint: what the answer must match; the sampler takes it over.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        stop_ids: frozenset[int],
        constraint: Constraint | None = None,
    ) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else int(params.seed)
        self.vocab_size = vocab_size
        self.constraint = constraint
        self.native = NativeWish.of(params, vocab_size)
        self._penalties = Penalties(params, prompt, [i for i in stop_ids if i < vocab_size])
        self._drawn = 0
        self._surprise_limit = 2.0 * params.mirostat_tau  # mirostat's mu

    @property
    def finished(self) -> bool:
        """The constraint is met and takes nothing more."""
        return self.constraint is not None and self.constraint.finished

    @property
    def plain(self) -> bool:
        """It takes the likeliest token, whatever came before."""
        return self.params.greedy and self.constraint is None and not self._penalties.active

    def fork(self, seed: int | None = None) -> Sampler:
        """A copy that goes on by itself: counts, repetitions, mirostat's and the grammar's state.

        seed: None keeps the noise the same.
        """
        other = Sampler.__new__(Sampler)
        other.__dict__.update(self.__dict__)
        if seed is not None:
            other.seed = int(seed)
        other._penalties = self._penalties.copy()
        if self.constraint is not None:
            other.constraint = self.constraint.fork()
        return other

    def draw(self, logits: np.ndarray, position: int) -> Draw:
        """`logits`: float32 [V] for the token that will stand at `position`; left unchanged.

        Raises `LocalLLMError` for broken logits, and where no token is left to draw.
        """
        from localllm.sampling.batch import draw_batch

        draw = draw_batch([self], logits[None], [position])[0]
        if isinstance(draw, Exception):
            raise draw
        return draw

    def accept(self, token_id: int) -> None:
        """Takes a token that was not drawn here. Mirostat's state stays, as no draw was seen.

        Raises `LocalLLMError` if the constraint does not allow it.
        """
        if self.constraint is not None:
            self.constraint.accept(token_id)
        self._penalties.append(token_id)
        self._drawn += 1

    def changes(self, logits: np.ndarray) -> RowChanges:
        """What penalties, bias and constraint do to this row."""
        if self.constraint is None and not self._penalties.active:
            return _UNCHANGED
        ids, values = _NO_IDS, _NO_VALUES
        if self._penalties.active:
            ids, values = self._penalties.edits(logits, self._drawn)
        allowed = None if self.constraint is None else self.constraint.allowed(len(logits))
        return RowChanges(ids, values, allowed)

    def choose(self, logits: np.ndarray, changes: RowChanges, position: int) -> int:
        """The token of this row by the definition; only mirostat's state moves."""
        plain = self.params.greedy and changes is _UNCHANGED
        changed = logits if plain else changes.applied(logits)
        if not np.isfinite(changed.max()):
            rest = (
                "" if changes.allowed is None else ", or the constraint allows none of the others"
            )
            raise LocalLLMError(
                f"no token can be drawn at position {position}: "
                f"the logits are NaN, infinite or banned{rest}"
            )
        if self.params.greedy:
            return int(np.argmax(changed))
        params = self.params
        temperature = params.temperature
        if params.dynatemp_range:
            temperature = processors.dynamic_temperature(
                changed, temperature, params.dynatemp_range, params.dynatemp_exponent
            )
        # Only differences matter; shifting first keeps tiny temperatures from overflowing.
        with np.errstate(over="ignore"):
            scaled = (changed - changed.max()) / temperature
        if params.mirostat:
            return self._choose_by_surprise(scaled, position)
        ids = processors.candidates(
            scaled,
            params.top_k,
            params.top_p,
            params.min_p,
            typical_p=params.typical_p,
            top_n_sigma=params.top_n_sigma,
        )
        return self._drawn_from(ids, scaled[ids], position)

    def choose_from(self, ids: np.ndarray, scaled: np.ndarray, position: int) -> int:
        """As `choose`, from what `NativeWish.only_cut` left: ascending ids, logits as filters see
        them."""
        params = self.params
        places = processors.refined(scaled, params.top_p, params.min_p, params.typical_p)
        return self._drawn_from(ids[places], scaled[places], position)

    def _drawn_from(self, ids: np.ndarray, scaled: np.ndarray, position: int) -> int:
        params = self.params
        if params.xtc_probability and coin(self.seed, position) < params.xtc_probability:
            keep = processors.exclude_top(scaled, params.xtc_threshold)
            ids, scaled = ids[keep], scaled[keep]
        return int(ids[np.argmax(scaled + gumbel(self.seed, position, ids))])

    def _choose_by_surprise(self, scaled: np.ndarray, position: int) -> int:
        ids = np.flatnonzero(scaled > -np.inf)
        ids = ids[processors.below_surprise(scaled[ids], self._surprise_limit)]
        place = int(np.argmax(scaled[ids] + gumbel(self.seed, position, ids)))
        surprise = -float(processors.log_softmax(scaled[ids])[place]) / np.log(2.0)
        self._surprise_limit -= self.params.mirostat_eta * (surprise - self.params.mirostat_tau)
        return int(ids[place])

    def take(self, token_id: int, logits: np.ndarray) -> Draw:
        """Goes on to the next position with a token chosen for this row."""
        self.accept(token_id)
        if self.params.logprobs is None:
            return Draw(token_id)
        return logprobs_of(logits, token_id, self.params.logprobs)


def logprobs_of(logits: np.ndarray, token_id: int, count: int) -> Draw:
    """A token's log-probability by the model alone, and those of the `count` likeliest tokens.

    Raises `LocalLLMError` if the logits are broken.
    """
    if not np.isfinite(logits.max()):
        raise LocalLLMError("no log-probabilities: the logits are NaN or infinite")
    logprobs = processors.log_softmax(logits.astype(np.float64))
    best = processors.likeliest(logprobs, min(count, len(logprobs)))
    top = tuple((int(i), float(logprobs[i])) for i in best)
    return Draw(token_id, float(logprobs[token_id]), top)
