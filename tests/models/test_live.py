"""Parity with the transformers that is installed, on weights and tokens of other seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models.running import (
    TOLERANCE,
    backend,
    difference,
    golden,
    golden_names,
    token_by_token,
    whole_prompt,
)
from tests.models.tiny import random_tensors, random_tokens, write_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def live() -> Any:
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install .[parity]")
    from scripts.goldens import models

    return models


@pytest.mark.parametrize("name", golden_names())
def test_fresh_weights_and_tokens(name: str, live: Any, tmp_path: Path) -> None:
    config = live.CASES[name]
    _, shapes = live.saved_form(config)
    tensors = random_tensors(shapes, seed=1)
    tokens = random_tokens(28, live.vocab_of(config), seed=1)
    whole, stepwise = live.reference_logits(config, tensors, tokens)
    running = backend(write_checkpoint(tmp_path, config, tensors), len(tokens))
    assert difference(whole_prompt(running, tokens), whole) < TOLERANCE
    assert difference(token_by_token(running, tokens), stepwise) < TOLERANCE


@pytest.mark.parametrize("name", golden_names())
def test_the_goldens_are_what_transformers_gives_today(name: str, live: Any) -> None:
    case = golden(name)
    assert case.config == live.CASES[name]
    _, shapes = live.saved_form(case.config)
    assert json.loads(json.dumps(shapes)) == case.shapes
    whole, stepwise = live.reference_logits(case.config, case.tensors(), case.tokens)
    assert difference(whole, case.whole) < 1e-5
    assert difference(stepwise, case.stepwise) < 1e-5


@pytest.mark.parametrize(
    ("model", "name"), [("smollm2", "gguf_smollm2"), ("gemma3", "gguf_gemma3")]
)
def test_every_logit_of_published_models(
    model: str, name: str, request: pytest.FixtureRequest
) -> None:
    for package in ("torch", "transformers", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install .[parity]")
    from scripts.goldens.models_gguf import reference_logits

    path: Path = request.getfixturevalue(model)
    tokens = random_tokens(24, 40000, seed=2)
    ours = whole_prompt(backend(path, len(tokens)), tokens)
    assert difference(ours, reference_logits(path, tokens)) < TOLERANCE
