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
