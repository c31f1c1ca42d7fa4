"""Greedy answers agree with llama.cpp's on the same files, up to the first near-tie."""

from __future__ import annotations

import json

import pytest

from localllm import LLM
from scripts.parity.llamacpp_greedy import GOLDEN, MODELS, Comparison, compare


@pytest.fixture(scope="module")
def goldens():
    return json.loads(GOLDEN.read_text("utf-8"))


def hold(comparison: Comparison) -> None:
    assert comparison.near_tie, (
        f"{comparison.prompt!r}: parted after {comparison.agreed} tokens at a gap of "
        f"{comparison.gap} logits, where the engines differ by {comparison.noise} at most"
    )


def test_one_answer_of_each_model(smollm2, gemma3, goldens):
    for name, path in zip(MODELS, (smollm2, gemma3), strict=True):
        with LLM(str(path), backend="reference") as llm:
            answer = goldens["models"][name][0]
            hold(compare(llm, {**answer, "ids": answer["ids"][:8]}))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_answer(name, goldens):
    with LLM(name, backend="reference") as llm:
        for answer in goldens["models"][name]:
            hold(compare(llm, answer))
