"""What a request may ask of the sampler, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real

from localllm.errors import InvalidRequest

MAX_LOGPROBS = 1000
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Every field is checked; a bad one raises `InvalidRequest`.

    max_tokens: at most this many new tokens; None: until the model stops or the context is full.
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k likeliest tokens; 0 or -1 is off.
    top_p: keep the smallest set of likeliest tokens whose probabilities reach p; 1 is off.
    min_p: drop tokens less likely than min_p times the likeliest; 0 is off.
    repetition_penalty: divides positive and multiplies negative logits of tokens already in the
        prompt or the answer (CTRL, Keskar et al. 2019); 1 is off.
    presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens already in
        the answer (as in the OpenAI API); 0 is off.
    logit_bias: token id -> value added to its logit; -inf bans it.
    seed: 0 … 2**64 - 1; the same seed gives the same answer. None: a fresh one, in the receipt.
    stop: strings that end the answer; they are not part of it.
    stop_token_ids: ids that end the answer, besides the model's own; they are not part of it.
    ignore_eos: the model's end-of-sequence ids do not end the answer.
    min_tokens: no end-of-sequence or stop id before this many tokens.
    logprobs: None, or how many of the likeliest tokens to report beside each chosen one.
        Log-probabilities are the model's own: natural logarithms of the softmax of the logits,
        before any change made here.
    """

    max_tokens: int | None = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, None)
        _number("temperature", self.temperature, 0.0, None)
        _whole("top_k", self.top_k, -1, None)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, None, open_low=True)
        _number("presence_penalty", self.presence_penalty, None, None)
        _number("frequency_penalty", self.frequency_penalty, None, None)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**64 - 1)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest(f"ignore_eos must be true or false, not {self.ignore_eos!r}")
        self._freeze_stops()
        self._freeze_logit_bias()

    def _freeze_stops(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS:
            raise InvalidRequest(f"stop has {len(stops)} strings; at most {MAX_STOPS} are taken")
        for stop in stops:
            if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
                raise InvalidRequest(
                    f"stop must hold non-empty strings of at most {MAX_STOP_LENGTH} characters, "
                    f"not {stop!r:.80}"
                )
        object.__setattr__(self, "stop", stops)
        ids = tuple(self.stop_token_ids or ())
        for token_id in ids:
            _whole("stop_token_ids", token_id, 0, None)
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in ids))

    def _freeze_logit_bias(self) -> None:
        bias = dict(self.logit_bias or {})
        for token_id, value in bias.items():
            _whole("a token id in logit_bias", token_id, 0, None)
            if not isinstance(value, Real) or math.isnan(value) or value == math.inf:
                raise InvalidRequest(f"logit_bias[{token_id}] must be a number, not {value!r}")
        object.__setattr__(self, "logit_bias", {int(k): float(v) for k, v in bias.items()})

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raises `InvalidRequest` if the parameters name tokens outside the vocabulary, or ban all."""
    for name, ids in (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        for token_id in ids:
            if token_id >= vocab_size:
                raise InvalidRequest(
                    f"{name} names token {token_id}; the vocabulary ends at {vocab_size - 1}"
                )
    banned = sum(1 for value in params.logit_bias.values() if value == float("-inf"))
    if banned >= vocab_size:
        raise InvalidRequest("logit_bias bans every token of the vocabulary")


def _whole(name: str, value: object, low: int, high: int | None) -> None:
    ok = isinstance(value, Integral) and not isinstance(value, bool)
    if not ok or value < low or (high is not None and value > high):  # type: ignore[operator]
        upper = "" if high is None else f" and at most {high}"
        raise InvalidRequest(f"{name} must be a whole number, at least {low}{upper}, not {value!r}")


def _number(
    name: str, value: object, low: float | None, high: float | None, *, open_low: bool = False
) -> None:
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        number = float(value)
        above = low is None or number > low or (number == low and not open_low)
        if above and (high is None or number <= high):
            return
    bounds = []
    if low is not None:
        bounds.append(f"{'above' if open_low else 'at least'} {low:g}")
    if high is not None:
        bounds.append(f"at most {high:g}")
    limits = f" {' and '.join(bounds)}" if bounds else ""
    raise InvalidRequest(f"{name} must be a finite number{limits}, not {value!r}")
