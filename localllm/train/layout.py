"""Which parameters a configuration trains, where they lie, and what they start from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from localllm.adapters.files import names_match
from localllm.adapters.lora import EXPERTS, LINEARS
from localllm.backend.weights import checked_weights
from localllm.errors import InvalidRequest
from localllm.models.layout import sources
from localllm.models.registry import ARCHITECTURES
from localllm.spec import DecoderSpec
from localllm.spec.weights import weight_shapes
from localllm.train.base import BaseWeights
from localllm.train.lora import LoRAConfig, TuneConfig
from localllm.train.program import Layout

T = TypeVar("T")
ALL_LINEAR = "all-linear"


def layout_for(spec: DecoderSpec, config: TuneConfig) -> Layout:
    """Every trained parameter's shape, and each target's scale.

    Raises InvalidRequest for a name that no linear of the model has, naming those that are there,
    and for dropout or DoRA on experts.
    """
    if not isinstance(config, LoRAConfig):
        return Layout(weight_shapes(spec), {})
    names = _Names(spec)
    chosen = names.targets(config.targets)
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(names.match(target, pattern) for target in chosen):
            raise names.unknown(pattern)
    shapes: dict[str, tuple[int, ...]] = {}
    scales: dict[str, float] = {}
    for target in chosen:
        *experts, out, inner = names.linears[target]
        if experts and (config.dropout or config.dora):
            raise InvalidRequest(
                f"{target}: adapters on experts have neither dropout nor DoRA, as in PEFT",
                hint="leave both out, or the experts",
            )
        rank = names.first(target, config.rank_pattern) or config.rank
        alpha = names.first(target, config.alpha_pattern) or config.alpha
        shapes[f"{target}.a"] = (*experts, rank, inner)
        shapes[f"{target}.b"] = (*experts, out, rank)
        if config.dora:
            shapes[f"{target}.magnitude"] = (out,)
        scales[target] = alpha / (math.sqrt(rank) if config.rslora else rank)
    return Layout(shapes, scales)


def initial(layout: Layout, seed: int, weights: BaseWeights | None = None) -> np.ndarray:
    """float32 [layout.size]: what training starts from, a function of seed and names alone.

    A is uniform within +-1 / sqrt(in) as in PEFT, B zero, so that the adapted model is the base to
    the bit. DoRA's magnitudes are the lengths of W's rows and full fine-tuning starts from W, so
    both need the `weights`.
    """
    flat = np.zeros(layout.size, np.float32)
    views = layout.views(flat)
    for name, view in views.items():
        if layout.scales and name.endswith(".a"):
            bound = np.float32(1 / math.sqrt(view.shape[-1]))
            view[...] = uniform(seed, name, view.size).reshape(view.shape) * bound
    magnitudes = {t: views[f"{t}.magnitude"] for t in layout.targets if f"{t}.magnitude" in views}
    if magnitudes or not layout.scales:
        assert weights is not None, "such parameters start from the base model's weights"
        for name, tensor in checked_weights(weights.spec, weights.tensors()):
            if not layout.scales:
                views[name][...] = tensor.to_float32()
            elif (target := name.removesuffix(".weight")) in magnitudes:
                magnitudes[target][...] = np.sqrt(squared_norms(tensor.to_float32()))
    return flat


def squared_norms(weight: np.ndarray) -> np.ndarray:
    """float32 [out]: of each row, summed in float64; DoRA's start and its norms share it."""
    total = np.empty(len(weight), np.float64)
    for row in range(0, len(weight), 256):
        part = weight[row : row + 256].astype(np.float64)
        total[row : row + 256] = np.add.reduce(np.square(part), axis=1)
    return total.astype(np.float32)


def uniform(seed: int, name: str, count: int) -> np.ndarray:
    """float32 [count] in [-1, 1), from raw bits: what numpy draws may change with its version."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


class _Names:
    """The linears of a model by our names and by those of its checkpoints."""

    def __init__(self, spec: DecoderSpec) -> None:
        self._spec = spec
        shapes = weight_shapes(spec)
        stems = (*LINEARS, *EXPERTS)
        names = (f"layers.{n}.{stem}" for n in range(len(spec.layers)) for stem in stems)
        self.linears: dict[str, tuple[int, ...]] = {
            name: shapes[f"{name}.weight"] for name in names if f"{name}.weight" in shapes
        }
        self._known = {target: tuple(self._spellings(target)) for target in self.linears}

    def targets(self, wanted: tuple[str, ...] | str) -> list[str]:
        if not self.linears:
            raise InvalidRequest(f"this {self._spec.architecture} model has no linear to adapt")
        patterns = (wanted,) if isinstance(wanted, str) else wanted
        for pattern in patterns:
            if not any(self._chosen(target, pattern) for target in self.linears):
                raise self.unknown(pattern)
        return [t for t in self.linears if any(self._chosen(t, pattern) for pattern in patterns)]

    def _chosen(self, target: str, pattern: str) -> bool:
        if pattern == ALL_LINEAR:
            return not _of_experts(target)
        return self.match(target, pattern)

    def match(self, target: str, pattern: str) -> bool:
        if _of_experts(target):
            # "down_proj" is a linear's name; experts are named by what they are in.
            return "." in pattern and any(names_match(n, (pattern,)) for n in self._known[target])
        return any(names_match(name, (pattern,)) for name in self._known[target])

    def first(self, target: str, patterns: Mapping[str, T]) -> T | None:
        return next((v for name, v in patterns.items() if self.match(target, name)), None)

    def unknown(self, pattern: str) -> InvalidRequest:
        stems = _unique(target.split(".", 2)[2] for target in self.linears)
        return InvalidRequest(
            f"{pattern!r} names no adapted linear of this {self._spec.architecture} model",
            hint=f'its linears are {", ".join(stems)}, or "all-linear"',
        )

    def _spellings(self, target: str) -> Iterator[str]:
        yield target
        _, layer, stem = target.split(".", 2)
        architecture = ARCHITECTURES.get(self._spec.architecture)
        if architecture is not None:
            for source in sources(architecture.names, stem):
                yield source.name.replace("{n}", layer)


def _of_experts(target: str) -> bool:
    return target.split(".", 2)[2] in EXPERTS


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))
