"""What a request may ask of the sampler, checked when it is made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args

from localllm.errors import InvalidRequest
from localllm.sampling.checks import flag, number, text, whole

MAX_LOGPROBS = 1000
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
MAX_SAMPLES = 64
MAX_BREAKERS = 64
MAX_GRAMMAR = 1 << 18  # characters of a schema, a grammar or a regular expression
MAX_CHOICES = 4096

Speculation = Literal["auto", "off", "ngram", "model", "head"]

CONSTRAINTS = ("json_schema", "regex", "grammar", "choices", "json_object")
# What cuts the distribution: mirostat does this by itself, and beam search draws nothing.
_FILTERS: Mapping[str, tuple[float, ...]] = {
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "top_n_sigma": (0.0, -1.0),
    "xtc_probability": (0.0,),
}


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Every field is checked; a bad one raises `InvalidRequest`.

    The logits of a token pass through, in this order: the constraint's mask, logit_bias,
    repetition_penalty, presence_penalty with frequency_penalty, DRY, min_tokens; temperature (or
    dynatemp); then the filters, each on what the one before left: top_n_sigma, top_k, typical_p,
    top_p, min_p, XTC; or mirostat in their place. docs/sampling.md has the definitions.

    max_tokens: at most this many new tokens; None: until the model stops or the context is full.
    temperature: 0 is greedy; otherwise logits are divided by it.
    dynatemp_range: the temperature follows the entropy of the distribution, from temperature -
        range (0 at least) for a certain token to temperature + range for an even choice; 0 is off.
    dynatemp_exponent: the power that the normalized entropy is raised to.
    top_k: keep the k likeliest tokens; 0 or -1 is off.
    top_p: keep the smallest set of likeliest tokens whose probabilities reach p; 1 is off.
    min_p: drop tokens less likely than min_p times the likeliest; 0 is off.
    typical_p: keep the tokens whose surprise is nearest to the entropy, until their probabilities
        reach p (Meister et al. 2022); 1 is off.
    top_n_sigma: keep logits within n standard deviations of the largest (Tang et al. 2024); 0 or
        -1 is off.
    xtc_probability, xtc_threshold: with this probability, drop all tokens at least as likely as
        the threshold but the least likely of them ("exclude top choices"); 0 is off.
    mirostat: 2 (or true) keeps the surprise of the answer near mirostat_tau bits (Basu et al. 2020,
        version 2); 0 (or false) is off. Takes the place of the filters.
    mirostat_tau, mirostat_eta: the target, and how fast it is approached.
    repetition_penalty: divides positive and multiplies negative logits of tokens already in the
        prompt or the answer (CTRL, Keskar et al. 2019); 1 is off.
    presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens already in
        the answer (as in the OpenAI API); 0 is off.
    dry_multiplier, dry_base, dry_allowed_length: subtract multiplier * base ** (n - allowed
        length) from a token that would prolong a repetition of n tokens; multiplier 0 is off.
    dry_range: how many of the last tokens are searched for repetitions; -1: all.
    dry_sequence_breakers: where repetitions end: text (any token that holds it) or token ids.
    logit_bias: token id -> value added to its logit; -inf bans it.
    seed: 0 … 2**64 - 1; the same seed gives the same answer. None: a fresh one, in the receipt.
    stop: strings that end the answer; they are not part of it.
    stop_token_ids: ids that end the answer, besides the model's own; they are not part of it.
    ignore_eos: the model's end-of-sequence ids do not end the answer.
    min_tokens: no end-of-sequence or stop id before this many tokens.
    logprobs: None, or how many of the likeliest tokens to report beside each chosen one.
        Log-probabilities are the model's own: natural logarithms of the softmax of the logits,
        before any change made here.
    prompt_logprobs: the same for the tokens of the prompt.
    n: how many answers to give; best_of: how many to sample for them, the likeliest are given.
    beams: the width of a beam search, which replaces sampling; None is off.
    length_penalty: beams are compared by log-probability / length ** penalty.
    json_schema, regex, grammar, choices, json_object: what the answer must match, at most one of
        them: a JSON schema (a mapping, or JSON text), a regular expression (Rust's syntax), a Lark
        grammar, one of several texts, any JSON object.
    speculation: whose guesses at the next tokens are tried: "auto" (whatever the model was loaded
        with), "ngram" (the text so far), "model" (a draft model), "head" (a draft head) or "off".
        It changes how fast an answer comes, never the answer.
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
    prompt_logprobs: int | None = None
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int | bool = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = -1
    dry_sequence_breakers: Sequence[str | int] = ("\n", ":", '"', "*")
    n: int = 1
    best_of: int | None = None
    beams: int | None = None
    length_penalty: float = 1.0
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choices: Sequence[str] | None = None
    json_object: bool = False
    speculation: Speculation = "auto"

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_distribution()
        self._check_penalties()
        self._freeze_stops()
        self._freeze_logit_bias()
        self._freeze_breakers()
        self._check_constraint()
        self._check_combinations()

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            whole("max_tokens", self.max_tokens, 1, None)
        whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        flag("ignore_eos", self.ignore_eos)
        if self.seed is not None:
            whole("seed", self.seed, 0, 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 0, MAX_LOGPROBS)
        whole("n", self.n, 1, MAX_SAMPLES)
        if self.best_of is not None:
            whole("best_of", self.best_of, 1, MAX_SAMPLES)
            if self.best_of < self.n:
                raise InvalidRequest(
                    f"best_of is {self.best_of}: fewer than the {self.n} answers that n asks for"
                )
        if self.beams is not None:
            whole("beams", self.beams, 1, MAX_SAMPLES)
        number("length_penalty", self.length_penalty, None, None)
        if self.speculation not in get_args(Speculation):
            raise InvalidRequest(
                f"speculation must be one of {', '.join(get_args(Speculation))}, "
                f"not {self.speculation!r}"
            )

    def _check_distribution(self) -> None:
        number("temperature", self.temperature, 0.0, None)
        whole("top_k", self.top_k, -1, None)
        number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        number("min_p", self.min_p, 0.0, 1.0)
        number("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        if self.top_n_sigma != -1:
            number("top_n_sigma", self.top_n_sigma, 0.0, None)
        number("xtc_probability", self.xtc_probability, 0.0, 1.0)
        number("xtc_threshold", self.xtc_threshold, 0.0, 1.0, open_low=True)
        number("dynatemp_range", self.dynatemp_range, 0.0, None)
        number("dynatemp_exponent", self.dynatemp_exponent, 0.0, None, open_low=True)
        if self.mirostat not in (0, 2) and self.mirostat is not True:
            raise InvalidRequest(
                f"mirostat must be 0 (off) or 2 (version 2), not {self.mirostat!r}",
                hint="version 1 is not offered; version 2 is simpler and does the same",
            )
        object.__setattr__(self, "mirostat", 2 if self.mirostat else 0)
        number("mirostat_tau", self.mirostat_tau, 0.0, None, open_low=True)
        number("mirostat_eta", self.mirostat_eta, 0.0, None, open_low=True)

    def _check_penalties(self) -> None:
        number("repetition_penalty", self.repetition_penalty, 0.0, None, open_low=True)
        number("presence_penalty", self.presence_penalty, None, None)
        number("frequency_penalty", self.frequency_penalty, None, None)
        number("dry_multiplier", self.dry_multiplier, 0.0, None)
        number("dry_base", self.dry_base, 1.0, None)
        whole("dry_allowed_length", self.dry_allowed_length, 1, None)
        if self.dry_range != -1:
            whole("dry_range", self.dry_range, 1, None)

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
            whole("stop_token_ids", token_id, 0, None)
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in ids))

    def _freeze_logit_bias(self) -> None:
        bias = dict(self.logit_bias or {})
        for token_id, value in bias.items():
            whole("a token id in logit_bias", token_id, 0, None)
            if not isinstance(value, Real) or math.isnan(value) or value == math.inf:
                raise InvalidRequest(f"logit_bias[{token_id}] must be a number, not {value!r}")
        object.__setattr__(self, "logit_bias", {int(k): float(v) for k, v in bias.items()})

    def _freeze_breakers(self) -> None:
        given = self.dry_sequence_breakers
        breakers = (given,) if isinstance(given, str) else tuple(given or ())
        texts = [breaker for breaker in breakers if isinstance(breaker, str)]
        if len(texts) > MAX_BREAKERS:
            raise InvalidRequest(
                f"dry_sequence_breakers has {len(texts)} texts; at most {MAX_BREAKERS} are taken"
            )
        for breaker in breakers:
            if isinstance(breaker, str):
                text("a text in dry_sequence_breakers", breaker, MAX_STOP_LENGTH)
            else:
                whole("a token id in dry_sequence_breakers", breaker, 0, None)
        frozen = tuple(int(b) if isinstance(b, Integral) else b for b in breakers)
        object.__setattr__(self, "dry_sequence_breakers", frozen)

    def _check_constraint(self) -> None:
        flag("json_object", self.json_object)
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                text(name, getattr(self, name), MAX_GRAMMAR)
        if self.json_schema is not None:
            self._freeze_schema()
        if self.choices is not None:
            given = self.choices
            if isinstance(given, str) or not isinstance(given, Sequence) or not given:
                raise InvalidRequest(f"choices must be a list of texts, not {given!r:.80}")
            if len(given) > MAX_CHOICES:
                raise InvalidRequest(
                    f"choices has {len(given)} texts; at most {MAX_CHOICES} are taken"
                )
            for choice in given:
                text("a text in choices", choice, MAX_GRAMMAR)
            if sum(map(len, given)) > MAX_GRAMMAR:
                raise InvalidRequest(f"choices has more than {MAX_GRAMMAR} characters together")
            object.__setattr__(self, "choices", tuple(given))
        asked = [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]
        if len(asked) > 1:
            raise InvalidRequest(
                f"an answer can follow one constraint, not {' and '.join(asked)}",
                hint="express them as one grammar",
            )

    def _freeze_schema(self) -> None:
        """Keeps the schema as JSON text, which cannot change any more."""
        schema = self.json_schema
        try:
            if isinstance(schema, Mapping):
                schema = json.dumps(dict(schema))
            elif not isinstance(schema, str):
                raise InvalidRequest(
                    f"json_schema must be a mapping or JSON text, not {schema!r:.80}"
                )
            elif not isinstance(json.loads(schema), dict | bool):
                raise ValueError("a schema is an object, true or false")
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"json_schema is no JSON: {error}") from error
        text("json_schema", schema, MAX_GRAMMAR)
        object.__setattr__(self, "json_schema", schema)

    def _check_combinations(self) -> None:
        filters = [name for name, off in _FILTERS.items() if getattr(self, name) not in off]
        if self.mirostat:
            if filters:
                raise InvalidRequest(
                    f"mirostat decides itself which tokens to keep; {filters[0]} would disturb it",
                    hint=f"leave {' and '.join(filters)} out, or mirostat",
                )
            if self.greedy:
                raise InvalidRequest(
                    "mirostat steers a random draw, and temperature 0 draws none",
                    hint="give a temperature above 0",
                )
        if self.dynatemp_range and self.greedy:
            raise InvalidRequest(
                "dynatemp_range varies a temperature, and temperature 0 is always greedy",
                hint="give a temperature above 0",
            )
        if self.beams is not None:
            drawn = [*filters, *(["mirostat"] if self.mirostat else [])]
            if drawn:
                raise InvalidRequest(
                    f"beams search for the likeliest answer and draw nothing; {drawn[0]} has no "
                    "meaning there",
                    hint=f"leave {' and '.join(drawn)} out, or beams",
                )
            if self.constrained:
                raise InvalidRequest("beams cannot follow a constraint (a schema, a grammar …)")
            if self.best_of is not None:
                raise InvalidRequest("best_of samples, beams search: ask for one of them")
            if self.beams < self.n:
                raise InvalidRequest(
                    f"beams is {self.beams}: fewer than the {self.n} answers that n asks for"
                )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop)

    @property
    def samples(self) -> int:
        """Answers to be made."""
        return self.best_of or self.n

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def draws(self) -> bool:
        """Whether chance, and so the seed, plays a part."""
        return not self.greedy and self.beams is None

    @property
    def constrained(self) -> bool:
        return any(getattr(self, name) not in (None, False) for name in CONSTRAINTS)


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raises `InvalidRequest` if the parameters name tokens outside the vocabulary, or ban all."""
    breakers: Sequence[str | int] = params.dry_sequence_breakers if params.dry_multiplier else ()
    for name, ids in (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
        ("dry_sequence_breakers", breakers),
    ):
        for token_id in ids:
            if isinstance(token_id, str):
                raise InvalidRequest(
                    f"dry_sequence_breakers holds the text {token_id!r}, and without a tokenizer "
                    "texts cannot be looked up",
                    hint="give token ids, or an empty list",
                )
            if token_id >= vocab_size:
                raise InvalidRequest(
                    f"{name} names token {token_id}; the vocabulary ends at {vocab_size - 1}"
                )
    banned = sum(1 for value in params.logit_bias.values() if value == float("-inf"))
    if banned >= vocab_size:
        raise InvalidRequest("logit_bias bans every token of the vocabulary")
