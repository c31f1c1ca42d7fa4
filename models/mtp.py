"""Layers that checkpoints bring along to predict one token more (MTP), as draft heads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from localllm.checkpoint.base import Checkpoint
from localllm.checkpoint.tensor import Dense
from localllm.errors import CheckpointError
from localllm.models.draft_head import DraftHead, layer_alone, no_vocabulary
from localllm.models.layout import Layout, Names, sources
from localllm.models.weights import read_layer
from localllm.spec import DecoderSpec, LayerSpec


@dataclass(frozen=True)
class Mtp:
    """Where such a layer lies in a checkpoint.

    names: of the layer's weights and of `final_norm`. Of the other three without `.weight`; all
    without what stands before them, one of `prefixes`. fuse: [D, 2 D], the embedding's columns
    first.
    """

    layer: LayerSpec
    names: Names
    prefixes: tuple[str, ...]
    hidden_norm: str
    embedding_norm: str
    fuse: str


def names_of_layer(names: Names, layer: int, **others: str) -> Names:
    """The names of that one layer, and of others."""
    return {
        stem: tuple(
            replace(source, name=source.name.replace("{n}", str(layer)))
            for source in sources(names, stem)
        )
        for stem in names
        if stem != "head"
    } | others


def read_mtp(checkpoint: Checkpoint, spec: DecoderSpec, mtp: Mtp) -> DraftHead | None:
    """None where the checkpoint was saved without it; raises as `load_weights`."""
    prefix = next((p for p in mtp.prefixes if f"{p}{mtp.fuse}.weight" in checkpoint), None)
    if prefix is None:
        return None

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        file = f"{prefix}{name}.weight"
        if file not in checkpoint:
            raise CheckpointError(f"{checkpoint.path}: {file} is missing")
        if checkpoint.shape(file) != shape:
            raise CheckpointError(
                f"{checkpoint.path}: {file} has the shape {list(checkpoint.shape(file))}; "
                f"the config calls for {list(shape)}"
            )
        return checkpoint.tensor(file).to_float32()

    width, norm = spec.hidden, mtp.layer.norm
    offset = np.float32(norm.offset)
    fuse = read(mtp.fuse, (width, 2 * width))
    own = layer_alone(spec.architecture, mtp.layer, spec.final_norm, width, spec.context)
    weights = read_layer(checkpoint, own, Layout(mtp.names, prefixes=(prefix,)))
    return DraftHead(
        own,
        {**no_vocabulary(width), **weights},
        read(mtp.hidden_norm, (width,)) + offset,
        read(mtp.embedding_norm, (width,)) + offset,
        from_hidden=Dense(np.ascontiguousarray(fuse[:, width:]), "float32"),
        from_embedding=Dense(np.ascontiguousarray(fuse[:, :width]), "float32"),
    )
