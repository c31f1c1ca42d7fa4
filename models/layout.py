"""How checkpoints name the tensors that become our weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from localllm.checkpoint.base import Checkpoint

# The first ones lie whole, one after the other. In "heads_…" each head's q and gate alternate; in
# "groups_…" each key head of a delta net brings all that belongs to it (Qwen3-Next).
Part = Literal[
    "q",
    "k",
    "v",
    "gate",
    "up",
    "heads_q",
    "heads_gate",
    "groups_qkv",
    "groups_z",
    "groups_beta",
    "groups_decay",
]


@dataclass(frozen=True)
class Source:
    """Where a weight lies in a checkpoint.

    name: the tensor's name without prefix and `.weight`; {n} is the layer, {e} an expert, whose
        matrices are then stacked.
    part: only these rows of a tensor that holds several of ours.
    bare: the name is whole; no `.weight` follows it.
    conv1d: a matrix kept [in, out], as GPT-2's Conv1D keeps it.
    alternate: with a part: rows of gate and up take turns in the tensor, gate's first.
    inputs_first: the matrices of all experts are kept [E, in, out].
    interleaved: the rows of each head are in the order (0, d/2, 1, d/2 + 1, …) that rotates
        neighbours, as llama.cpp wants some architectures; ours rotate (0, d/2).
    taps: the filters of a convolution by channel, in so many dimensions: [channels, 1, kernel] in
        3, without the 1 in 2.
    row: a matrix of one row, which may be kept as a vector.
    tiled: the value heads of a delta net take turns, the first of every key head, then the second
        of each …, as llama.cpp wants Qwen 3.5; ours are sorted by key head.
    negative_exp: kept as -exp(w).
    """

    name: str
    part: Part | None = None
    bare: bool = False
    conv1d: bool = False
    interleaved: bool = False
    alternate: bool = False
    inputs_first: bool = False
    taps: int = 0
    row: bool = False
    tiled: bool = False
    negative_exp: bool = False


# Our name without "layers.N." and ".weight" -> the places to look, in order of preference. A bias
# that is not beside its weight has an entry of its own, "moe.gate.bias".
Names = Mapping[str, "str | Source | tuple[str | Source, ...]"]

# Base models are saved bare; multimodal ones keep their language model under a name of its own.
PREFIXES = ("model.", "", "language_model.model.", "model.language_model.", "transformer.")
HEAD_PREFIXES = ("", "language_model.", "model.")


def own_prefix(architecture: str) -> str:
    """What transformers puts before the names of a causal language model, but for its head."""
    return "transformer." if architecture == "gpt2" else "model."


def norm_offset(architecture: str) -> float:
    """What transformers adds to the weights of a checkpoint's norms."""
    zero_centred = ("gemma2", "gemma3", "qwen3_5", "qwen3_5_moe", "qwen3_next")
    return 1.0 if architecture in zero_centred else 0.0


@dataclass(frozen=True)
class Layout:
    """How one checkpoint names its tensors.

    buffers: patterns of tensors that hold nothing learned.
    other_parts: patterns of tensors of other models in the checkpoint, such as a vision tower.
    """

    names: Names
    prefixes: tuple[str, ...] = PREFIXES
    buffers: tuple[str, ...] = ()
    other_parts: tuple[str, ...] = ()


def sources(names: Names, stem: str) -> tuple[Source, ...]:
    entry = names.get(stem, ())
    entries = entry if isinstance(entry, tuple) else (entry,)
    return tuple(Source(name) if isinstance(name, str) else name for name in entries)


def sources_of(names: Names, stem: str, suffix: str) -> tuple[Source, ...]:
    """Where `stem.suffix` may lie: by its own entry, or by that of its stem."""
    return sources(names, f"{stem}.{suffix}") or sources(names, stem)


def prefix_of(checkpoint: Checkpoint, layout: Layout) -> str:
    """What stands before all names but the head's, told by the embedding."""
    embed = f"{sources(layout.names, 'embed')[0].name}.weight"
    found = (prefix for prefix in layout.prefixes if prefix + embed in checkpoint)
    return next(found, layout.prefixes[0])


def embed_name(checkpoint: Checkpoint, layout: Layout) -> str:
    """The tensor of the embedding, or what it would be called."""
    return f"{prefix_of(checkpoint, layout)}{sources(layout.names, 'embed')[0].name}.weight"


def head_name(checkpoint: Checkpoint, layout: Layout) -> str | None:
    """The tensor of an output head of its own, if there is one."""
    for source in sources(layout.names, "head"):
        for prefix in HEAD_PREFIXES:
            if (name := f"{prefix}{source.name}.weight") in checkpoint:
                return name
    return None
