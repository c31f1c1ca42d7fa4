"""Filters and the repetition penalty against transformers; scripts/goldens/sampling.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from localllm.sampling import SamplingParams
from localllm.sampling.penalties import Penalties
from localllm.sampling.processors import candidates
from scripts.goldens.sampling import logits_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/sampling.json").read_text())


@pytest.mark.parametrize(
    "case", GOLDEN["filters"], ids=lambda case: f"{case['seed']}-{'-'.join(case['params'])}"
)
def test_filters_keep_what_transformers_keeps(case):
    params = SamplingParams(**case["params"])
    logits = logits_of(case["seed"]).astype(np.float64)
    scaled = (logits - logits.max()) / params.temperature
    kept = candidates(scaled, params.top_k, params.top_p, params.min_p, typical_p=params.typical_p)
    assert kept.tolist() == case["kept"]


@pytest.mark.parametrize("case", GOLDEN["repetition"], ids=lambda case: str(case["penalty"]))
def test_the_repetition_penalty_is_that_of_transformers(case):
    logits = logits_of(case["seed"])
    penalties = Penalties(SamplingParams(repetition_penalty=case["penalty"]), case["prompt"], ())
    changed = logits.astype(np.float64)
    ids, values = penalties.edits(logits, 0)
    changed[ids] = values
    assert np.argsort(-changed)[:20].tolist() == case["best"]
    assert changed[case["best"]].tolist() == pytest.approx(case["scores"], abs=1e-6)
