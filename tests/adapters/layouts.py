"""Layouts of adapters as training makes them, and values to put there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from localllm.adapters.lora import EXPERTS, LINEARS
from localllm.spec import DecoderSpec
from localllm.spec.weights import weight_shapes
from localllm.train.program import Layout


@dataclass(frozen=True)
class Settings:
    """What `save_adapter` asks of a training's config."""

    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


def linears(spec: DecoderSpec) -> list[str]:
    """All that an adapter may touch, experts too."""
    shapes = weight_shapes(spec)
    stems = (*LINEARS, *EXPERTS)
    names = (f"layers.{n}.{stem}" for n in range(len(spec.layers)) for stem in stems)
    return [name for name in names if f"{name}.weight" in shapes]


def layout(
    spec: DecoderSpec,
    settings: Settings,
    *,
    targets: list[str] | None = None,
    rank: Callable[[str], int] = lambda target: 3,
) -> Layout:
    shapes: dict[str, tuple[int, ...]] = {}
    scales: dict[str, float] = {}
    for target in linears(spec) if targets is None else targets:
        *experts, out, inner = weight_shapes(spec)[f"{target}.weight"]
        if experts and settings.dora:
            continue  # there is none on experts
        r = rank(target)
        shapes[f"{target}.a"] = (*experts, r, inner)
        shapes[f"{target}.b"] = (*experts, out, r)
        if settings.dora:
            shapes[f"{target}.magnitude"] = (out,)
        scales[target] = settings.alpha / (r**0.5 if settings.rslora else r)
    return Layout(shapes, scales)


def parameters(layout: Layout, seed: int = 3) -> np.ndarray:
    """float32 [layout.size]; magnitudes are positive."""
    flat = np.random.default_rng(seed).normal(0, 0.05, layout.size).astype(np.float32)
    for name, view in layout.views(flat).items():
        if name.endswith(".magnitude"):
            view[:] = np.abs(view) * 8 + 0.5
    return flat
