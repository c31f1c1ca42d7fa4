from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import InvalidRequest
from localllm.sampling import SamplingParams
from localllm.tui.sampling_fields import (
    SamplingField,
    parse,
    sampling_fields,
    sampling_params,
    shown,
    to_keep,
)

FIELDS = {field.name: field for field in sampling_fields()}
SOUND = {
    "max_tokens": st.none() | st.integers(1, 10**9),
    "temperature": st.floats(0.01, 5),
    "top_k": st.integers(-1, 1000),
    "top_p": st.floats(0.01, 1),
    "seed": st.none() | st.integers(0, 2**64 - 1),
    "stop": st.lists(st.text(min_size=1, max_size=20), max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 50_000), max_size=4),
    "ignore_eos": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(0, 50_000), st.sampled_from([-math.inf, -2.5, 3.0])),
    "repetition_penalty": st.floats(0.1, 3),
    "speculation": st.sampled_from(["auto", "off", "ngram", "model", "head"]),
    "dry_sequence_breakers": st.lists(st.text(min_size=1, max_size=5) | st.integers(0, 99)),
    "choices": st.none() | st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=4),
}


def test_every_parameter_has_a_field_and_an_explanation():
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(SamplingParams)}
    assert [field.name for field in FIELDS.values() if not field.help] == []
    assert "0 is greedy" in FIELDS["temperature"].help
    assert FIELDS["best_of"].help.startswith("how many to sample")


@pytest.mark.parametrize("field", sampling_fields(), ids=lambda field: field.name)
def test_what_is_shown_for_a_default_is_read_as_the_default(field: SamplingField):
    read = parse(field, shown(field, field.default))
    default = dataclasses.asdict(SamplingParams())[field.name]
    assert dataclasses.asdict(SamplingParams(**{field.name: read}))[field.name] == default


@given(st.fixed_dictionaries({}, optional=SOUND))
def test_values_survive_the_form_and_the_store(values):
    params = sampling_params(values)
    typed = {name: shown(field, getattr(params, name)) for name, field in FIELDS.items()}
    read = {name: parse(field, typed[name]) for name, field in FIELDS.items()}
    kept = json.loads(json.dumps(to_keep(read)))
    assert sampling_params(kept) == params


def test_only_what_differs_is_kept():
    values = {name: field.default for name, field in FIELDS.items()}
    assert to_keep(values) == {}
    assert to_keep({**values, "temperature": 0.5, "stop": "END"}) == {
        "temperature": 0.5,
        "stop": ["END"],
    }


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("top_k", "many"),
        ("temperature", "hot"),
        ("stop_token_ids", "1, two"),
        ("logit_bias", "17"),
        ("stop", '["open'),
    ],
)
def test_what_is_no_value_is_refused_by_name(name, typed):
    with pytest.raises(InvalidRequest, match=name):
        parse(FIELDS[name], typed)


def test_an_unknown_parameter_is_refused_by_name():
    with pytest.raises(InvalidRequest, match="heat"):
        sampling_params({"heat": 1})
