"""Adapters that `save_adapter` writes for tiny models, with what PEFT computed from them.

The logits come from scripts/goldens/saved_adapters.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localllm.adapters.writing import save_adapter
from localllm.checkpoint import open_checkpoint
from localllm.models import load_spec
from localllm.spec import DecoderSpec
from tests.adapters.layouts import Settings, layout, linears, parameters
from tests.models.running import Golden, golden

FOLDER = Path(__file__).parent / "saved_golden"


@dataclass(frozen=True)
class Saved:
    """chosen: which targets; None for all."""

    model: str
    settings: Settings
    rank: Callable[[str], int] = lambda target: 4
    chosen: Callable[[str], bool] = lambda target: True

    @property
    def base(self) -> Golden:
        return golden(self.model)

    def save(self, model: Path, folder: Path) -> Path:
        """model: the folder of the base."""
        spec = _spec(model)
        targets = [name for name in linears(spec) if self.chosen(name)]
        made = layout(spec, self.settings, targets=targets, rank=self.rank)
        values = parameters(made) * np.float32(4)
        return save_adapter(
            folder, made, values, config=self.settings, base_model=str(model), spec=spec
        )


def _spec(model: Path) -> DecoderSpec:
    checkpoint = open_checkpoint(model)
    try:
        return load_spec(checkpoint)
    finally:
        checkpoint.close()


def _by_place(target: str) -> int:
    return 2 + int(target.split(".")[1]) + (3 if "down" in target else 0)


CASES = {
    "llama": Saved("llama-gqa", Settings(alpha=8)),
    "llama-ranks-rslora": Saved("llama-gqa", Settings(alpha=7, rslora=True), rank=_by_place),
    "llama-one-layer": Saved("llama-gqa", Settings(), chosen=lambda t: "layers.1.attn" in t),
    "llama-dora": Saved("llama-gqa", Settings(alpha=8, dora=True)),
    "gemma3": Saved("gemma3-pattern", Settings(alpha=4), rank=_by_place),
    "phi3": Saved("phi3-mha", Settings(alpha=8)),
    "phi3-q-and-v": Saved("phi3-mha", Settings(), chosen=lambda t: t[-1] in "qv"),
    "phi3-dora": Saved("phi3-mha", Settings(dora=True)),
    "gpt2": Saved("gpt2-tied", Settings(alpha=8)),
    "gpt2-dora": Saved("gpt2-tied", Settings(alpha=8, dora=True)),
    "mixture": Saved("qwen3_moe-norm-topk", Settings(alpha=8), chosen=lambda t: ".attn." in t),
    "mixture-experts": Saved("qwen3_moe-norm-topk", Settings(alpha=8), rank=_by_place),
    "mixture-up-alone": Saved("qwen3_moe-norm-topk", Settings(), chosen=lambda t: "moe.up" in t),
    "gpt_oss-experts": Saved(
        "gpt_oss-top2-yarn",
        Settings(alpha=6, rslora=True),
        chosen=lambda t: "moe" in t or "1.attn.q" in t,
    ),
    "glm4": Saved("glm4-gqa", Settings(alpha=8)),
}
