"""Greedy answers agree with llama.cpp's on the same files, up to the first near-tie."""

from __future__ import annotations

import json

import pytest

from localllm import LLM
from scripts.parity.llamacpp_greedy import BACKENDS, GOLDEN, MODELS, Comparison, compare


@pytest.fixture(scope="module")
def goldens():
    return json.loads(GOLDEN.read_text("utf-8"))


def hold(comparison: Comparison) -> None:
    assert comparison.near_tie, (
        f"{comparison.prompt!r}: parted after {comparison.agreed} tokens at a gap of "
        f"{comparison.gap} logits, where the engines differ by {comparison.noise} at most"
    )


@pytest.mark.parametrize(("backend", "answers"), [("cpu", 10), ("reference", 1)])
def test_some_answers_of_each_model(backend, answers, smollm2, gemma3, goldens):
    for name, path in zip(MODELS, (smollm2, gemma3), strict=True):
        with LLM(str(path), backend=backend) as llm:
            for answer in goldens["models"][name][:answers]:
                hold(compare(llm, answer, tokens=8))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_answer(name, backend, goldens):
    with LLM(name, backend=backend) as llm:
        for answer in goldens["models"][name]:
            hold(compare(llm, answer))
