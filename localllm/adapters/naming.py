"""From our linears to the modules of transformers' models: the way back from `mapping.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from localllm.adapters.lora import EXPERTS, LINEARS
from localllm.errors import UnsupportedModel
from localllm.models.layout import Source, own_prefix, sources
from localllm.models.registry import ARCHITECTURES
from localllm.models.weights import mixed_order
from localllm.spec import DecoderSpec, MoESpec
from localllm.spec.weights import weight_shapes

# Layers that keep their matrices [in, out].
_CONV1D = ("gpt2",)


@dataclass(frozen=True)
class Module:
    """A linear of transformers' model, which holds one of ours or several one after the other; or
    the stacked matrices of its experts, a parameter.

    targets: ours (`layers.0.attn.q` …) in the order of their rows. adapted: those of them that the
        adapter has. rows: of each target, by its name. mixed: where they do not follow each other
        after all, which of those rows each row of the module is. experts: of a parameter, how many.
    """

    name: str
    targets: tuple[str, ...]
    adapted: tuple[str, ...]
    rows: dict[str, int]
    mixed: np.ndarray | None = None
    experts: int | None = None


def modules_of(spec: DecoderSpec, targets: Iterable[str]) -> list[Module]:
    """The modules that hold these linears, in the order of their layers.

    Raises UnsupportedModel for an architecture without a table of names, or a target it has not.
    """
    wanted = set(targets)
    names = linear_names(spec) | expert_names(spec)
    if unknown := sorted(wanted - set(names)):
        raise UnsupportedModel(f"this {spec.architecture} model has no linear {unknown[0]}")
    shapes = weight_shapes(spec)
    together: dict[str, list[str]] = {}
    for target, module in names.items():
        together.setdefault(module, []).append(target)
    return [
        Module(
            name,
            tuple(parts),
            tuple(part for part in parts if part in wanted),
            {part: shapes[f"{part}.weight"][-2] for part in parts},
            _mixed(spec, parts),
            experts=next(iter(shapes[f"{parts[0]}.weight"][:-2]), None),
        )
        for name, parts in together.items()
        if wanted & set(parts)
    ]


def _mixed(spec: DecoderSpec, targets: list[str]) -> np.ndarray | None:
    if len(targets) == 1:
        return None
    names = ARCHITECTURES[spec.architecture].names
    _, layer, stem = targets[0].split(".", 2)
    if stem in EXPERTS:
        rows = np.arange(2 * spec.layers[int(layer)].ffn.hidden)
        return rows.reshape(2, -1).T.reshape(-1) if _stacked(spec, stem).alternate else None
    parts = [sources(names, target.split(".", 2)[2])[0].part for target in targets]
    return mixed_order(spec, parts, int(layer))


def expert_names(spec: DecoderSpec) -> dict[str, str]:
    """Of all stacks of experts that an adapter may touch: their parameter in transformers' model.

    Raises UnsupportedModel for an architecture without a table of names.
    """
    return _names(spec, EXPERTS)


def linear_names(spec: DecoderSpec) -> dict[str, str]:
    """Of every linear that an adapter may touch: its module in transformers' model.

    Raises UnsupportedModel for an architecture without a table of names.
    """
    return _names(spec, LINEARS)


def _names(spec: DecoderSpec, stems: Iterable[str]) -> dict[str, str]:
    if spec.architecture not in ARCHITECTURES:
        raise UnsupportedModel(f"adapters of {spec.architecture} models are not supported")
    shapes = weight_shapes(spec)
    return {
        target: module_name(spec, stem, layer)
        for layer in range(len(spec.layers))
        for stem in stems
        if f"{(target := f'layers.{layer}.{stem}')}.weight" in shapes
    }


def module_name(spec: DecoderSpec, stem: str, layer: int) -> str:
    """stem: "attn.q" …; the first place that the architecture's table names, of experts the one
    that stacks them."""
    source = (
        _stacked(spec, stem)
        if stem in EXPERTS
        else sources(ARCHITECTURES[spec.architecture].names, stem)[0]
    )
    return own_prefix(spec.architecture) + source.name.replace("{n}", str(layer))


def _stacked(spec: DecoderSpec, stem: str) -> Source:
    """Where transformers keeps the dense matrices of all experts."""
    return next(
        source
        for source in sources(ARCHITECTURES[spec.architecture].names, stem)
        if source.bare and source.name.endswith("_proj")
    )


def keeps_conv1d(spec: DecoderSpec) -> bool:
    return spec.architecture in _CONV1D


def short_names(spec: DecoderSpec, modules: Iterable[str]) -> list[str]:
    """What `target_modules` may say for exactly these modules: the last words of their names where
    every layer's are meant, else the names in full."""
    chosen = set(modules)
    if any(isinstance(layer.ffn, MoESpec) for layer in spec.layers):
        return sorted(chosen)  # experts have linears by the same last word
    known = set(linear_names(spec).values())
    words: dict[str, set[str]] = {}
    for module in known:
        words.setdefault(module.rpartition(".")[2], set()).add(module)
    found: list[str] = []
    for word, having in sorted(words.items()):
        if having <= chosen:
            found.append(word)
        else:
            found += sorted(having & chosen)
    return found
