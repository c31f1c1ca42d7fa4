"""Parameters are checked when they are made; an error names the field."""

from __future__ import annotations

import math

import pytest

from localllm.errors import InvalidRequest
from localllm.sampling import SamplingParams, check_token_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -2),
        ("top_k", 0.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("seed", -1),
        ("seed", 2**64),
        ("min_tokens", 300),
        ("min_tokens", -1),
        ("logprobs", -1),
        ("logprobs", 10**6),
        ("ignore_eos", "yes"),
        ("stop", ["ok", ""]),
        ("stop", [1]),
        ("stop", ["x"] * 65),
        ("stop", "x" * 1025),
        ("stop_token_ids", [-1]),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {"a": 1.0}),
        ("typical_p", 0.0),
        ("typical_p", 1.1),
        ("top_n_sigma", -0.5),
        ("xtc_probability", 1.2),
        ("xtc_threshold", 0.0),
        ("dynatemp_range", -1.0),
        ("dynatemp_exponent", 0.0),
        ("mirostat", 1),
        ("mirostat", "2"),
        ("mirostat_tau", 0.0),
        ("mirostat_eta", math.inf),
        ("dry_multiplier", -1.0),
        ("dry_base", 0.9),
        ("dry_allowed_length", 0),
        ("dry_range", 0),
        ("dry_range", -2),
        ("dry_sequence_breakers", ["\n", ""]),
        ("dry_sequence_breakers", [-1]),
        ("dry_sequence_breakers", [1.5]),
        ("dry_sequence_breakers", ["x"] * 65),
        ("n", 0),
        ("n", 65),
        ("best_of", 0),
        ("beams", 0),
        ("prompt_logprobs", -1),
        ("json_schema", 5),
        ("json_schema", "{"),
        ("json_schema", "[1]"),
        ("json_schema", {"enum": [object()]}),
        ("json_schema", '{"description": "' + "x" * 2**18 + '"}'),
        ("regex", ""),
        ("regex", 3),
        ("regex", "a" * (2**18 + 1)),
        ("regex", "\ud800"),
        ("grammar", ""),
        ("choices", []),
        ("choices", "yes"),
        ("choices", ["yes", ""]),
        ("choices", ["yes"] * 5000),
        ("choices", ["x" * 2**17] * 3),
        ("json_object", 1),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest, match=field):
        SamplingParams(**{field: value})


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="END").stop_strings == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop=None).stop_strings == ()


@pytest.mark.parametrize("params", [{"logit_bias": {50: 1.0}}, {"stop_token_ids": [50]}])
def test_token_ids_outside_the_vocabulary_are_refused(params):
    with pytest.raises(InvalidRequest, match="50"):
        check_token_ids(SamplingParams(**params), vocab_size=50)


def test_banning_the_whole_vocabulary_is_refused():
    params = SamplingParams(logit_bias=dict.fromkeys(range(4), -math.inf))
    with pytest.raises(InvalidRequest, match="every token"):
        check_token_ids(params, vocab_size=4)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"mirostat": 2, "top_k": 40}, "mirostat .* top_k"),
        ({"mirostat": 2, "xtc_probability": 0.1}, "mirostat .* xtc_probability"),
        ({"mirostat": 2, "temperature": 0}, "mirostat .* temperature"),
        ({"dynatemp_range": 0.5, "temperature": 0}, "dynatemp_range .* temperature"),
        ({"n": 3, "best_of": 2}, "best_of .* n"),
        ({"n": 3, "beams": 2}, "beams .* n"),
        ({"beams": 2, "best_of": 4}, "best_of .* beams"),
        ({"beams": 2, "top_p": 0.9}, "beams .* top_p"),
        ({"beams": 2, "mirostat": 2}, "beams .* mirostat"),
        ({"beams": 2, "regex": "a"}, "beams .* constraint"),
        ({"regex": "a", "json_object": True}, "regex and json_object"),
        ({"json_schema": {}, "choices": ["a"]}, "json_schema and choices"),
    ],
)
def test_what_cannot_work_together_is_refused_with_the_reason(params, words):
    with pytest.raises(InvalidRequest, match=words):
        SamplingParams(**params)


def test_every_off_value_goes_with_everything():
    SamplingParams(
        mirostat=2, top_k=-1, top_p=1, min_p=0, typical_p=1, top_n_sigma=-1, xtc_probability=0
    )
    SamplingParams(beams=4, n=4, temperature=0)
    assert SamplingParams(mirostat=True).mirostat == 2
    assert SamplingParams(mirostat=False).mirostat == 0


def test_a_schema_cannot_be_changed_after_it_was_given():
    schema = {"type": "integer"}
    params = SamplingParams(json_schema=schema)
    schema["type"] = "string"
    assert params.json_schema == '{"type": "integer"}'
    assert SamplingParams(json_schema=params.json_schema) == params


def test_texts_in_breakers_need_a_tokenizer_only_where_they_count():
    check_token_ids(SamplingParams(), vocab_size=4)
    check_token_ids(SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=[3]), vocab_size=4)
    with pytest.raises(InvalidRequest, match="dry_sequence_breakers"):
        check_token_ids(SamplingParams(dry_multiplier=1.0), vocab_size=4)
    with pytest.raises(InvalidRequest, match="dry_sequence_breakers"):
        check_token_ids(SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=[4]), 4)
