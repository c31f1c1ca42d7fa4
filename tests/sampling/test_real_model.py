"""Constrained answers of a real model, end to end."""

from __future__ import annotations

import json

import jsonschema
import pytest

from localllm import LLM, SamplingParams
from tests.sampling.test_constraints import SCHEMAS


@pytest.fixture(scope="module")
def llm(smollm2):
    with LLM(str(smollm2), context=512, kv_tokens=4096) as model:
        yield model


def test_smollm2_follows_every_schema_at_temperature_2(llm):
    """In one batch, each schema with its own seed; what ended by itself validates."""
    schemas = list(SCHEMAS.values())
    params = [
        SamplingParams(json_schema=schema, temperature=2.0, seed=seed, max_tokens=200)
        for schema in schemas
        for seed in range(2)
    ]
    prompt = llm.chat_prompt([{"role": "user", "content": "Answer in JSON."}])
    results = llm.generate([prompt] * len(params), params)
    assert all(result.finish_reason == "stop" for result in results)
    for result, wish in zip(results, params, strict=True):
        jsonschema.validate(json.loads(result.text), json.loads(wish.json_schema))


def test_smollm2_chooses(llm):
    messages = [{"role": "user", "content": "Is the sky blue? Answer yes or no."}]
    result = llm.chat(messages, SamplingParams(choices=["yes", "no"], temperature=0))
    assert result.text in ("yes", "no")
    assert result.receipt.stopped_by == "constraint"
