"""Parity of the architectures: our logits against those of transformers, as table rows."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from localllm.models import known_architectures  # noqa: E402
from tests.models.running import (  # noqa: E402
    backend,
    difference,
    golden,
    golden_names,
    token_by_token,
    whole_prompt,
)

TITLE = "Architectures"
NOTE = "Largest difference from transformers' float32 logits, as a share of the largest one."
HEADER = ("Architecture", "Case", "Whole prompt", "Token by token")


def rows() -> list[tuple[str, ...]]:
    """One row a case: the largest difference as a share of the largest |logit|, twice."""
    order = [kind.removesuffix("_text") for kind in known_architectures()]
    names = sorted(golden_names(), key=lambda name: order.index(name.split("-")[0]))
    return [_row(name) for name in names]


def _row(name: str) -> tuple[str, ...]:
    case = golden(name)
    architecture, _, what = name.partition("-")
    with tempfile.TemporaryDirectory() as folder:
        running = backend(case.write(Path(folder)), len(case.tokens))
        whole = difference(whole_prompt(running, case.tokens), case.whole)
        single = difference(token_by_token(running, case.tokens), case.stepwise)
    return architecture, what.replace("-", " "), f"{whole:.1e}", f"{single:.1e}"
