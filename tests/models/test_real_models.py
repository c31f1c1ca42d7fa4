"""Published GGUF files give the logits that transformers gives for the same file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.models.running import GOLDEN, TOLERANCE, backend, whole_prompt


def assert_same_top_logits(name: str, path: Path) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    tokens = golden["tokens"]
    positions = tuple(row["position"] for row in golden["rows"])
    logits = whole_prompt(backend(path, len(tokens)), tokens, positions)
    for ours, row in zip(logits, golden["rows"], strict=True):
        theirs = np.array(row["logits"])
        allowed = TOLERANCE * np.abs(theirs).max()
        assert np.abs(ours[row["ids"]] - theirs).max() < allowed
        assert (np.sort(ours)[::-1][: len(theirs)] - theirs).max() < allowed, "others are larger"


def test_smollm2(smollm2: Path) -> None:
    assert_same_top_logits("gguf_smollm2", smollm2)


@pytest.mark.slow
def test_gemma3_beyond_its_window(gemma3: Path) -> None:
    assert_same_top_logits("gguf_gemma3", gemma3)
