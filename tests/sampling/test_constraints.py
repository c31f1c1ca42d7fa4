"""Constrained answers always match, whatever the model would rather say."""

from __future__ import annotations

import json
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.errors import InvalidRequest, LocalLLMError
from localllm.sampling import (
    Sampler,
    SamplingParams,
    Vocabulary,
    compile_constraint,
    draw_batch,
    with_breaker_ids,
)
from localllm.tokenizer import Tokenizer, load_tokenizer
from tests.examples import examples

SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "items": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {"enum": ["red", "green", 3, None, "ünïcode"]},
            },
            "inner": {"$ref": "#/$defs/inner"},
        },
        "required": ["items", "inner"],
        "additionalProperties": False,
        "$defs": {
            "inner": {
                "type": "object",
                "properties": {"ok": {"type": "boolean"}},
                "required": ["ok"],
                "additionalProperties": False,
            }
        },
    },
    "either": {
        "anyOf": [
            {"type": "integer", "minimum": 5, "maximum": 250},
            {"type": "string", "pattern": "^[a-f]{2,6}$"},
            {"type": "null"},
        ]
    },
    "date": {"type": "string", "format": "date"},
    "numbers": {"type": "array", "items": {"type": "number"}, "maxItems": 2},
}


@pytest.fixture(scope="module")
def tokenizers(smollm2, gemma3) -> dict[str, tuple[Tokenizer, Vocabulary]]:
    made = {}
    for name, path in (("smollm2", smollm2), ("gemma3", gemma3)):
        tokenizer = load_tokenizer(path)
        assert tokenizer is not None
        made[name] = tokenizer, vocabulary_of(tokenizer)
    return made


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(
        tokenizer.all_token_bytes(),
        tokenizer.eos_ids,
        tokenizer.special_ids,
        lambda text: tokenizer.encode(text, add_special=False),
    )


def letters() -> Vocabulary:
    """Every byte a token; 256 is the end, 257 a control token that spells "yes"."""
    tokens = [bytes([byte]) for byte in range(256)]
    return Vocabulary(
        [*tokens, b"<end>", b"yes"],
        frozenset({256}),
        frozenset({256, 257}),
        lambda t: [*t.encode()],
    )


def answers(
    vocabulary: Vocabulary, count: int, seed: int, extra: int = 0, most: int = 400, **params
) -> list[list[int]]:
    """Drawn from random logits at a temperature that ruins everything left to chance."""
    wish = SamplingParams(temperature=2.0, max_tokens=None, **params)
    constraint = compile_constraint(wish, vocabulary)
    assert constraint is not None
    vocab = len(vocabulary.tokens) + extra
    samplers = [
        Sampler(wish, (0,), vocab, vocabulary.eos_ids, constraint.fork()).fork(seed=seed + i)
        for i in range(count)
    ]
    rng = np.random.default_rng(seed)
    # Like a model's logits on something else, with ends and quotes likely enough to come about.
    base = rng.normal(size=vocab).astype(np.float32) * 2
    for token, text in enumerate(vocabulary.tokens):
        base[token] += 6.0 * (text[:1] in (b'"', b"}", b"]") and len(text) < 3)
    base[list(vocabulary.eos_ids)] += 8
    tokens: list[list[int]] = [[] for _ in samplers]
    going = list(range(count))
    for position in range(most):
        if not going:
            return tokens
        noise = rng.normal(size=vocab).astype(np.float32)
        logits = np.tile(base + noise, (len(going), 1))
        draws = draw_batch([samplers[i] for i in going], logits, [position] * len(going))
        still = []
        for i, draw in zip(going, draws, strict=True):
            assert not isinstance(draw, Exception), draw
            if draw.token_id not in vocabulary.eos_ids:
                tokens[i].append(draw.token_id)
                if not samplers[i].finished:
                    still.append(i)
        going = still
    raise AssertionError(f"no end after {most} tokens: {bytes_of(vocabulary, tokens[going[0]])!r}")


def bytes_of(vocabulary: Vocabulary, tokens: list[int]) -> bytes:
    return b"".join(vocabulary.tokens[token] for token in tokens)


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_json_follows_its_schema_at_temperature_2(tokenizers, model, name):
    tokenizer, vocabulary = tokenizers[model]
    count = 6 if model == "smollm2" else 2
    for tokens in answers(vocabulary, count, seed=1, json_schema=SCHEMAS[name]):
        value = json.loads(tokenizer.decode(tokens))
        jsonschema.validate(value, SCHEMAS[name], format_checker=jsonschema.FormatChecker())


def test_any_json_object(tokenizers):
    tokenizer, vocabulary = tokenizers["smollm2"]
    for tokens in answers(vocabulary, 4, seed=3, most=1500, json_object=True):
        assert isinstance(json.loads(tokenizer.decode(tokens)), dict)


@pytest.mark.parametrize(
    "pattern", [r"[0-9]{3}-[a-z]{1,30}", r"(yes|no), (perhaps|Ünsïn)!?", r"\d{1,3}"]
)
def test_a_regular_expression_matches_in_full(tokenizers, pattern):
    for tokenizer, vocabulary in tokenizers.values():
        for tokens in answers(vocabulary, 3, seed=5, regex=pattern):
            assert re.fullmatch(pattern, tokenizer.decode(tokens))


def test_a_lark_grammar_is_followed(tokenizers):
    grammar = 'start: sum\nsum: NUMBER ("+" NUMBER)~1..3 "="\nNUMBER: /[1-9][0-9]{0,2}/\n'
    tokenizer, vocabulary = tokenizers["smollm2"]
    for tokens in answers(vocabulary, 4, seed=7, grammar=grammar):
        assert re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2}){1,3}=", tokenizer.decode(tokens))


@settings(max_examples=examples(30))
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6), st.integers(0, 2**32))
def test_one_of_the_choices_comes_out_whatever_they_hold(choices, seed):
    vocabulary = letters()
    for tokens in answers(vocabulary, 2, seed, choices=choices):
        assert bytes_of(vocabulary, tokens).decode() in choices


def test_every_choice_can_come_out():
    vocabulary = letters()
    choices = ["a", "ab", "no", "42"]
    drawn = answers(vocabulary, 200, 0, choices=choices)
    assert {bytes_of(vocabulary, tokens).decode() for tokens in drawn} == set(choices)


def test_control_tokens_and_padding_are_never_text():
    """Token 257 spells "yes" but is no text; rows beyond the vocabulary are never allowed."""
    vocabulary = letters()
    for tokens in answers(vocabulary, 20, 0, extra=40, choices=["yes"]):
        assert tokens == [*b"yes"]


def test_an_end_is_allowed_exactly_where_the_grammar_can_stop():
    constraint = compile_constraint(SamplingParams(regex="ab?"), letters())
    assert allowed(constraint) == {ord("a")}
    constraint.accept(ord("a"))
    assert constraint.satisfied
    assert not constraint.finished
    assert allowed(constraint) == {ord("b"), 256}
    other = constraint.fork()
    other.accept(256)
    assert other.finished
    constraint.accept(ord("b"))
    assert constraint.finished
    assert allowed(constraint) == {256}


def test_with_ignore_eos_only_the_grammar_ends():
    constraint = compile_constraint(SamplingParams(regex="ab?", ignore_eos=True), letters())
    constraint.accept(ord("a"))
    assert allowed(constraint) == {ord("b")}


def test_every_end_token_of_a_model_may_end_an_answer(tokenizers):
    tokenizer, vocabulary = tokenizers["smollm2"]
    assert len(tokenizer.eos_ids) > 1
    constraint = compile_constraint(SamplingParams(regex="x*"), vocabulary)
    assert tokenizer.eos_ids <= allowed(constraint, tokenizer.vocab_size)


def test_a_fork_of_a_sampler_has_a_grammar_of_its_own():
    wish = SamplingParams(temperature=0, regex="ab|cd")
    one = Sampler(wish, (0,), 258, frozenset({256}), compile_constraint(wish, letters()))
    fork = one.fork()
    logits = np.zeros(258, dtype=np.float32)
    assert fork.draw(logits, 0).token_id == ord("a")
    logits[ord("c")] = 1
    assert one.draw(logits, 0).token_id == ord("c")
    assert fork.draw(logits, 1).token_id == ord("b")
    assert one.draw(logits, 1).token_id == ord("d")
    assert one.finished
    assert fork.finished


def test_logprobs_stay_the_models_own_under_a_constraint():
    wish = SamplingParams(regex="a", logprobs=1)
    one = Sampler(wish, (0,), 258, frozenset({256}), compile_constraint(wish, letters()))
    draw = one.draw(np.zeros(258, dtype=np.float32), 0)
    assert draw.token_id == ord("a")
    assert draw.logprob == pytest.approx(-np.log(258))


def test_a_token_that_breaks_the_grammar_is_refused():
    constraint = compile_constraint(SamplingParams(regex="ab"), letters())
    with pytest.raises(LocalLLMError, match="constraint"):
        constraint.accept(ord("x"))


def test_where_bias_bans_all_that_the_grammar_allows_the_error_says_so():
    wish = SamplingParams(regex="a", logit_bias={ord("a"): -np.inf})
    one = Sampler(wish, (0,), 258, frozenset({256}), compile_constraint(wish, letters()))
    with pytest.raises(LocalLLMError, match=r"position 4: .* constraint"):
        one.draw(np.zeros(258, dtype=np.float32), 4)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"regex": "(?=a)b"}, "regex cannot be used: .*look-around"),
        ({"regex": "(a"}, "regex"),
        ({"grammar": "start: foo"}, "grammar cannot be used: .*foo"),
        ({"json_schema": {"type": "nonsense"}}, "json_schema cannot be used: .*nonsense"),
        ({"json_schema": {"type": "object", "not": {}}}, "json_schema"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name_and_reason(wish, words):
    with pytest.raises(InvalidRequest, match=f"(?s){words}"):
        compile_constraint(SamplingParams(**wish), letters())


def test_an_explosive_expression_ends_in_an_error_not_in_endless_work():
    wish = SamplingParams(regex="(((a{1,900}){1,900}){1,900}){1,900}")
    constraint = compile_constraint(wish, letters())

    def follow() -> None:
        for _ in range(1000):
            constraint.allowed(258)
            constraint.accept(ord("a"))

    with pytest.raises(LocalLLMError, match=r"constraint .* too many"):
        follow()


def test_a_vocabulary_without_an_end_cannot_be_constrained():
    vocabulary = Vocabulary([b"a"], frozenset(), frozenset(), lambda text: [])
    with pytest.raises(InvalidRequest, match="end"):
        compile_constraint(SamplingParams(regex="a"), vocabulary)


def test_breakers_become_the_tokens_that_hold_them(tokenizers):
    tokenizer, vocabulary = tokenizers["smollm2"]
    params = with_breaker_ids(SamplingParams(dry_multiplier=1.0), vocabulary)
    texts = {tokenizer.token_bytes(t) for t in params.dry_sequence_breakers}
    assert {b"\n", b":", b'"', b"*"} <= texts
    assert all(any(mark in text for mark in b'\n:"*') for text in texts)
    with pytest.raises(InvalidRequest, match="no token"):
        with_breaker_ids(
            SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=["no such token at all"]),
            vocabulary,
        )


def allowed(constraint, vocab: int = 258) -> set[int]:
    bits = np.unpackbits(constraint.allowed(vocab).view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())
