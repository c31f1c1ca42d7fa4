"""Every architecture computes what transformers computes, to 1e-4 of the largest logit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from localllm.checkpoint.opening import open_checkpoint
from localllm.models import known_architectures, load_spec
from tests.models.running import (
    TOLERANCE,
    Golden,
    backend,
    difference,
    golden,
    golden_names,
    token_by_token,
    whole_prompt,
)


@pytest.fixture(params=golden_names())
def case(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def test_logits_match_transformers(case: Golden, tmp_path: Path) -> None:
    running = backend(case.write(tmp_path), len(case.tokens))
    assert difference(whole_prompt(running, case.tokens), case.whole) < TOLERANCE
    assert difference(token_by_token(running, case.tokens), case.stepwise) < TOLERANCE


def test_a_config_saved_by_transformers_5_says_the_same(case: Golden, tmp_path: Path) -> None:
    folder = case.write(tmp_path)
    asked = load_spec(open_checkpoint(folder))
    (folder / "config.json").write_text(json.dumps(case.saved_config))
    assert load_spec(open_checkpoint(folder)) == asked


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope-long-tied"])
def test_a_known_prompt_length_makes_single_tokens_equal_the_whole_prompt(
    name: str, tmp_path: Path
) -> None:
    case = golden(name)
    assert not np.allclose(case.whole, case.stepwise, atol=0.1), "the length must matter here"
    running = backend(case.write(tmp_path), len(case.tokens))
    single = token_by_token(running, case.tokens, prompt_length=len(case.tokens))
    assert difference(single, case.whole) < TOLERANCE


def test_every_architecture_has_at_least_three_cases() -> None:
    types = [name.split("-")[0] for name in golden_names()]
    for kind in known_architectures():
        assert types.count(kind.removesuffix("_text")) >= 3
