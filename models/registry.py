"""Which architecture a checkpoint holds, and the two calls that load one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from localllm.checkpoint.base import Checkpoint
from localllm.checkpoint.form import Form
from localllm.checkpoint.tensor import Affine, Dense, Tensor
from localllm.errors import CheckpointError, UnsupportedModel
from localllm.models import (
    exaone4,
    gemma2,
    gemma3,
    gemma4,
    gguf,
    glm4,
    glm4_moe,
    gpt2,
    gpt_oss,
    granite,
    lfm2,
    lfm2_moe,
    llama,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    starcoder2,
)
from localllm.models.config import Config
from localllm.models.draft_head import DraftHead
from localllm.models.layout import Layout, Names, embed_name, head_name
from localllm.models.mtp import Mtp, read_mtp
from localllm.models.weights import read_forms, read_kinds, read_weights
from localllm.spec import DecoderSpec


@dataclass(frozen=True)
class Architecture:
    """What an architecture file offers; see `Layout` for buffers and other_parts, in which {past}
    is the number of the layer after the last. mtp: a layer that predicts one token more."""

    spec: Callable[[Config], DecoderSpec]
    names: Names
    buffers: tuple[str, ...] = ()
    other_parts: tuple[str, ...] = ()
    mtp: Callable[[DecoderSpec], Mtp] | None = None


# Buffers that older checkpoints saved along with the weights.
_BUFFERS = ("*.rotary_emb.inv_freq",)

_QWEN3_5 = Architecture(
    qwen3_5.spec, qwen3_5.NAMES, other_parts=qwen3_5.OTHER_PARTS, mtp=qwen3_5.mtp
)
_QWEN3_5_MOE = Architecture(
    qwen3_5_moe.spec, qwen3_5_moe.NAMES, other_parts=qwen3_5.OTHER_PARTS, mtp=qwen3_5_moe.mtp
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(llama.spec, llama.NAMES),
    "mistral": Architecture(mistral.spec, llama.NAMES),
    "ministral3": Architecture(ministral3.spec, ministral3.NAMES),
    "mistral3": Architecture(
        ministral3.wrapped_spec, ministral3.NAMES, other_parts=ministral3.OTHER_PARTS
    ),
    "mixtral": Architecture(mixtral.spec, mixtral.NAMES),
    "qwen2": Architecture(qwen2.spec, llama.NAMES),
    "qwen3": Architecture(qwen3.spec, qwen3.NAMES),
    "qwen3_moe": Architecture(qwen3_moe.spec, qwen3_moe.NAMES),
    "qwen3_5": _QWEN3_5,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5_MOE,
    "qwen3_5_moe_text": _QWEN3_5_MOE,
    "qwen3_next": Architecture(
        qwen3_next.spec,
        qwen3_next.NAMES,
        other_parts=qwen3_5.OTHER_PARTS,
        mtp=qwen3_next.mtp,
    ),
    "lfm2": Architecture(lfm2.spec, lfm2.NAMES),
    "lfm2_moe": Architecture(lfm2_moe.spec, lfm2_moe.NAMES),
    "gemma2": Architecture(gemma2.spec, gemma2.NAMES),
    "gemma3": Architecture(gemma3.spec, gemma3.NAMES, other_parts=gemma3.OTHER_PARTS),
    "gemma3_text": Architecture(gemma3.spec, gemma3.NAMES),
    "gemma4": Architecture(gemma4.spec, gemma4.NAMES, other_parts=gemma4.OTHER_PARTS),
    "gemma4_text": Architecture(gemma4.spec, gemma4.NAMES),
    "phi3": Architecture(phi3.spec, phi3.NAMES),
    "smollm3": Architecture(smollm3.spec, llama.NAMES),
    "olmo2": Architecture(olmo2.spec, olmo2.NAMES),
    "olmo3": Architecture(olmo3.spec, olmo2.NAMES),
    "exaone4": Architecture(exaone4.spec, exaone4.NAMES),
    "glm4": Architecture(glm4.spec, glm4.NAMES),
    "glm4_moe": Architecture(
        glm4_moe.spec, glm4_moe.NAMES, other_parts=glm4_moe.OTHER_PARTS, mtp=glm4_moe.mtp
    ),
    "seed_oss": Architecture(seed_oss.spec, llama.NAMES),
    "granite": Architecture(granite.spec, llama.NAMES),
    "starcoder2": Architecture(starcoder2.spec, starcoder2.NAMES),
    "gpt_oss": Architecture(gpt_oss.spec, gpt_oss.NAMES),
    "gpt2": Architecture(gpt2.spec, gpt2.NAMES, buffers=gpt2.BUFFERS),
}


def known_architectures() -> tuple[str, ...]:
    """The model types that can be loaded."""
    return tuple(ARCHITECTURES)


def load_spec(checkpoint: Checkpoint) -> DecoderSpec:
    """The decoder that a checkpoint describes.

    Raises UnsupportedModel for an architecture or option that we do not run, named, and
    CheckpointError for a config value that is missing or makes no sense.
    """
    if checkpoint.format == "gguf":
        return _tied_as_stored(
            checkpoint,
            gguf.load_spec(checkpoint, {name: found.spec for name, found in ARCHITECTURES.items()}),
        )
    config = Config(checkpoint.config, checkpoint.path)
    spec = _architecture(config).spec(config)
    return _tied_as_stored(checkpoint, spec)


def spec_of_config(values: Mapping[str, Any], path: Path) -> DecoderSpec:
    """The decoder of a config.json without weights; path: the file, for messages.

    Raises what `load_spec` raises.
    """
    config = Config(values, path)
    return _architecture(config).spec(config)


def load_weights(
    checkpoint: Checkpoint, spec: DecoderSpec, *, only: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Pairs of our weight name and its tensor, read one at a time as they are asked for.

    only: the names of those that are wanted; None for all.
    Names and order are those of `localllm.spec.weights.weight_shapes`. All names and shapes are
    checked before this returns: CheckpointError for a missing tensor or a shape that
    contradicts the config, UnsupportedModel for tensors the architecture has no place for.
    """
    return read_weights(checkpoint, spec, _layout(checkpoint), only)


def load_mtp(checkpoint: Checkpoint, spec: DecoderSpec) -> DraftHead:
    """The layer of the checkpoint that predicts one token more, as a draft head.

    Raises UnsupportedModel where it has none, and what `load_weights` raises.
    """
    if checkpoint.format != "gguf":
        mtp = _architecture(Config(checkpoint.config, checkpoint.path)).mtp
        head = None if mtp is None else read_mtp(checkpoint, spec, mtp(spec))
        if head is not None:
            return head
    having = ", ".join(name for name, found in ARCHITECTURES.items() if found.mtp is not None)
    raise UnsupportedModel(
        f"{checkpoint.path}: has no layer that predicts one token more (MTP) which we can read",
        hint=f"Those of {having} in safetensors are known. Or train a draft head: "
        "localllm finetune --method draft-head.",
    )


def load_forms(checkpoint: Checkpoint, spec: DecoderSpec) -> dict[str, Form]:
    """How each weight of `spec` is stored, by our name, told from headers alone."""
    return read_forms(checkpoint, spec, _layout(checkpoint))


def load_kinds(checkpoint: Checkpoint, spec: DecoderSpec) -> dict[str, str]:
    """What the file calls the type of each weight of `spec`, by our name: "BF16", "Q4_K" …"""
    return read_kinds(checkpoint, spec, _layout(checkpoint))


def _layout(checkpoint: Checkpoint) -> Layout:
    if checkpoint.format == "gguf":
        return gguf.layout(checkpoint)
    config = Config(checkpoint.config, checkpoint.path)
    found = _architecture(config)
    past = str(config.values.get("num_hidden_layers"))
    others = tuple(pattern.replace("{past}", past) for pattern in found.other_parts)
    return Layout(found.names, buffers=(*_BUFFERS, *found.buffers), other_parts=others)


def _architecture(config: Config) -> Architecture:
    kind = config.text("model_type")
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{config.source}: the architecture {kind!r} is not supported",
            hint=f"Known: {', '.join(ARCHITECTURES)}.",
        )
    if config.has("quantization_config"):
        quantization = config.section("quantization_config")
        if quantization.has("quant_method") and quantization.text("quant_method") != "mxfp4":
            raise quantization.unsupported("quant_method", quantization.values["quant_method"])
    return ARCHITECTURES[kind]


def _tied_as_stored(checkpoint: Checkpoint, spec: DecoderSpec) -> DecoderSpec:
    """Settles whether embedding and head are one matrix, by config and by what is in the file."""
    layout = _layout(checkpoint)
    head = head_name(checkpoint, layout)
    if head is None:
        if checkpoint.config.get("tie_word_embeddings") is False:
            raise CheckpointError(
                f"{checkpoint.path}: lm_head.weight is missing",
                hint="The config says that the head is no copy of the embedding.",
            )
        return replace(spec, tied_head=True)
    if not spec.tied_head:
        return spec
    # As transformers: a head that differs from the embedding stays, whatever the config says.
    embed = embed_name(checkpoint, layout)
    same = embed in checkpoint and _equal(checkpoint.tensor(embed), checkpoint.tensor(head))
    return replace(spec, tied_head=same)


def _equal(a: Tensor, b: Tensor) -> bool:
    if isinstance(a, Dense) and isinstance(b, Dense) and a.dtype == b.dtype:
        return np.array_equal(a.data, b.data)
    if isinstance(a, Affine) and isinstance(b, Affine):
        return a.shape == b.shape and np.array_equal(a.codes, b.codes)
    return False
