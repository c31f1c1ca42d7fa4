"""What the readers of adapter folders have in common: the pairs of a safetensors file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from localllm.checkpoint.safetensors import SafetensorsFile, StoredTensor
from localllm.errors import CheckpointError, UnsupportedModel

MAX_RANK = 4096
MAX_SCALE = 1e6


@dataclass(frozen=True)
class ModulePair:
    """A module's two matrices, and DoRA's magnitudes [out], not read yet.

    experts: of how many it holds the pairs, A [E * r, in] by expert and B [out, r * E] by rank;
        None for those of a linear.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    experts: int | None = None


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder whose config and file agree; names are those of the base model's modules.

    transposed: A is [in, r] and B [r, out], as MLX-LM keeps them.
    layers: the layers that the config allows, None for all. last_layers: the same, from the end.
    named, named_experts: modules, and stacked experts, that the config lists, of which those that
        the model has must be here.
    experts_turned: what wrote the file took stacked experts of [out, in] for [in, out].
    """

    file: SafetensorsFile
    pairs: Mapping[str, ModulePair]
    transposed: bool = False
    layers: frozenset[int] | None = None
    last_layers: int | None = None
    named: tuple[str, ...] = ()
    named_experts: tuple[str, ...] = ()
    experts_turned: bool = False


class Endings(NamedTuple):
    """How a format ends the names of a module's tensors."""

    a: str
    b: str
    magnitude: str


def find_pairs(
    file: SafetensorsFile, endings: Endings, *, dora: bool
) -> dict[str, tuple[StoredTensor, StoredTensor, StoredTensor | None]]:
    """Both matrices of each module and with DoRA its magnitudes, by the module's name as the file
    has it.

    Raises CheckpointError for one without the other, UnsupportedModel for any other tensor.
    """
    wanted = {*endings} if dora else {endings.a, endings.b}
    stems: dict[str, set[str]] = {}
    for name in file.tensors:
        ending = next((end for end in endings if name.endswith(end)), None)
        if ending is None:
            raise _foreign(file.path, name)
        if ending not in wanted:
            raise CheckpointError(
                f"{file.path}: {name} belongs to DoRA, which adapter_config.json does not name"
            )
        stems.setdefault(name.removesuffix(ending), set()).add(ending)
    for stem, found in stems.items():
        for ending in sorted(wanted - found):
            raise CheckpointError(
                f"{file.path}: {stem}{ending} is missing",
                hint="The file is incomplete; save or download the adapter again.",
            )
    if not stems:
        raise CheckpointError(f"{file.path}: holds no tensors")
    return {
        stem: (
            file.find(stem + endings.a),
            file.find(stem + endings.b),
            file.find(stem + endings.magnitude) if dora else None,
        )
        for stem in stems
    }


def checked_scale(path: Path, module: str, scale: float) -> float:
    if not (math.isfinite(scale) and abs(scale) <= MAX_SCALE):
        raise CheckpointError(f"{path}: the scale of {module} is {scale:g}, which makes no sense")
    return scale


def names_match(name: str, targets: Collection[str]) -> bool:
    """Whether the module is one of these, or ends like one, as PEFT compares them."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def check_targets(path: Path, modules: Collection[str], targets: Collection[str]) -> None:
    """CheckpointError unless the config names every module."""
    for module in modules:
        if not names_match(module, targets):
            raise CheckpointError(
                f"{path}: has tensors for {module}, which adapter_config.json does not name"
            )


def _foreign(path: Path, name: str) -> UnsupportedModel:
    if "lora_embedding" in name:
        return UnsupportedModel(
            f"{path}: {name} adapts an embedding, which is not supported",
            hint="Train the adapter on the linears of attention and feed-forward alone.",
        )
    if ".lora_" in name and name.endswith(".bias"):
        return UnsupportedModel(
            f"{path}: {name} is a bias of LoRA's own (lora_bias), which is not supported",
            hint="Train the adapter without lora_bias.",
        )
    return UnsupportedModel(
        f"{path}: {name} is no matrix of LoRA",
        hint="Weights trained in full cannot be loaded beside the base model: merge the adapter "
        "into its model and load that.",
    )
