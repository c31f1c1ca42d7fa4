"""Answers that must match something: a JSON schema, a regular expression, a grammar, a choice.

llguidance follows the text byte by byte and says which tokens may come next; it is imported when
the first constraint is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from localllm.errors import InvalidRequest, LocalLLMError
from localllm.sampling.params import CONSTRAINTS, SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_CACHED_GRAMMARS = 32
# Between the parts of JSON. Without a bound some models never come to the next part.
_WHITESPACE = r"[ \t\n\r]{1,32}"


class Vocabulary:
    """What a constraint needs to know of a tokenizer; made once for each.

    tokens: the bytes of every token, by id. eos_ids: what ends an answer. special_ids: control
    tokens, which no text allows. encode: text to ids.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        eos_ids: frozenset[int],
        special_ids: frozenset[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens = tokens
        self.eos_ids = eos_ids
        self.special_ids = special_ids
        self._encode = encode
        self._matcher_of = lru_cache(_CACHED_GRAMMARS)(self._compile)

    def tokens_holding(self, text: str) -> list[int]:
        """Ids of the tokens in whose text this one occurs; control tokens are no text."""
        wanted = text.encode()
        return [
            token_id
            for token_id, token in enumerate(self.tokens)
            if wanted in token and token_id not in self.special_ids
        ]

    def matcher(self, grammar: str) -> LLMatcher:
        """A fresh matcher. Raises ValueError, with llguidance's words, for a bad grammar."""
        return self._matcher_of(grammar).deep_copy()

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._llguidance, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(_words_of(matcher))
        return matcher

    @cached_property
    def _llguidance(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_TokenizerView(self)), n_vocab=len(self.tokens))

    @property
    def eos_id(self) -> int:
        """The end as llguidance knows it; the others are allowed where it is."""
        if not self.eos_ids:
            raise InvalidRequest("a constraint needs to know how an answer ends: no end token")
        return min(self.eos_ids)

    def encode(self, text: str) -> list[int]:
        return self._encode(text)


class _TokenizerView:
    """A vocabulary as llguidance wants to see it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_id
        self.bos_token_id = None
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted(vocabulary.special_ids | vocabulary.eos_ids)
        self._encode = vocabulary.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class Constraint:
    """Where one answer stands in what it must match."""

    def __init__(
        self, matcher: LLMatcher, eos_ids: frozenset[int], eos_id: int, *, ends: bool
    ) -> None:
        """`ends`: whether an end token may end it, where the grammar can stop."""
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._eos_id = eos_id
        self._ends = ends

    @property
    def finished(self) -> bool:
        """It is matched in full, and nothing more can come."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def satisfied(self) -> bool:
        """The answer so far is a match; more may come."""
        return self._matcher.is_accepting()

    def fork(self) -> Constraint:
        """A copy that goes on by itself."""
        return Constraint(self._matcher.deep_copy(), self._eos_ids, self._eos_id, ends=self._ends)

    def allowed(self, vocab_size: int) -> np.ndarray:
        """uint32 [ceil(V / 32)]: bit t % 32 of word t / 32 says whether token t may come next."""
        bits = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
        can_end = self._matcher.is_accepting()
        if not self._matcher.is_stopped():
            mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)[: len(bits)]
            bits[: len(mask)] = mask
            can_end = bool(bits[self._eos_id >> 5] >> np.uint32(self._eos_id & 31) & np.uint32(1))
        self._check()
        for token in self._eos_ids:
            if token < vocab_size:
                bit = np.uint32(1 << (token & 31))
                if can_end and self._ends:
                    bits[token >> 5] |= bit
                else:
                    bits[token >> 5] &= ~bit
        return bits

    def accept(self, token_id: int) -> None:
        """Raises `LocalLLMError` if this token may not come next."""
        token = self._eos_id if token_id in self._eos_ids else token_id
        if self.finished and token == self._eos_id:
            return
        if not self._matcher.consume_token(token):
            self._check()
            raise LocalLLMError(f"the constraint does not allow token {token_id} here")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise LocalLLMError(
                f"the constraint cannot be followed any further: {_words_of(self._matcher)}"
            )


def compile_constraint(params: SamplingParams, vocabulary: Vocabulary) -> Constraint | None:
    """What the parameters ask an answer to match; None if nothing.

    Raises `InvalidRequest` for a schema, grammar or expression that llguidance refuses.
    """
    if not params.constrained:
        return None
    try:
        matcher = vocabulary.matcher(_grammar_of(params))
    except ValueError as error:
        name = next(name for name in CONSTRAINTS if getattr(params, name) not in (None, False))
        raise InvalidRequest(f"{name} cannot be used: {error}") from error
    return Constraint(matcher, vocabulary.eos_ids, vocabulary.eos_id, ends=not params.ignore_eos)


def with_breaker_ids(params: SamplingParams, vocabulary: Vocabulary) -> SamplingParams:
    """The same parameters with the texts of dry_sequence_breakers replaced by token ids.

    Raises `InvalidRequest` for a text that no token holds.
    """
    breakers = params.dry_sequence_breakers
    if not params.dry_multiplier or all(isinstance(breaker, int) for breaker in breakers):
        return params
    ids: set[int] = set()
    for breaker in breakers:
        if isinstance(breaker, int):
            ids.add(breaker)
            continue
        found = vocabulary.tokens_holding(breaker)
        if not found:
            raise InvalidRequest(
                f"dry_sequence_breakers: no token of this model holds {breaker!r:.80}",
                hint="give shorter texts, single characters at best",
            )
        ids.update(found)
    return replace(params, dry_sequence_breakers=tuple(sorted(ids)))


def _grammar_of(params: SamplingParams) -> str:
    from llguidance import LLMatcher

    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.grammar is not None:
        return LLMatcher.grammar_from_lark(params.grammar)
    if params.choices is not None:
        return LLMatcher.grammar_from_regex("|".join(map(_literal, params.choices)))
    schema: Any = params.json_schema if params.json_schema is not None else '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": _WHITESPACE})


def _literal(text: str) -> str:
    """A regular expression that matches this text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):X}}}" for c in text)


def _words_of(matcher: LLMatcher) -> str:
    return matcher.get_error().replace("<non-verbose/>", "").strip()
