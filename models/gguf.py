"""GGUF files: llama.cpp's tensor names and conventions, undone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from localllm.checkpoint.base import Checkpoint
from localllm.models.config import Config
from localllm.models.gguf_config import GGUFConfig, architecture
from localllm.models.layout import Layout, Names, Source
from localllm.spec import DecoderSpec, LayerSpec, NormSpec

# Converters reorder the rows of q and k for these, so that RoPE turns neighbouring entries.
_INTERLEAVED = ("llama", "smollm3", "granite")

_NAMES: Names = {
    "embed": "token_embd",
    "pos_embed": "position_embd",
    "attn_norm": "blk.{n}.attn_norm",
    "attn.q": ("blk.{n}.attn_q", Source("blk.{n}.attn_qkv", part="q")),
    "attn.k": ("blk.{n}.attn_k", Source("blk.{n}.attn_qkv", part="k")),
    "attn.v": ("blk.{n}.attn_v", Source("blk.{n}.attn_qkv", part="v")),
    "attn.o": "blk.{n}.attn_output",
    "attn.q_norm": "blk.{n}.attn_q_norm",
    "attn.k_norm": "blk.{n}.attn_k_norm",
    "attn_post_norm": "blk.{n}.post_attention_norm",
    "ffn_norm": "blk.{n}.ffn_norm",
    "ffn.gate": "blk.{n}.ffn_gate",
    "ffn.up": "blk.{n}.ffn_up",
    "ffn.down": "blk.{n}.ffn_down",
    "ffn_post_norm": "blk.{n}.post_ffw_norm",
    "moe.router": "blk.{n}.ffn_gate_inp",
    "moe.gate": (
        "blk.{n}.ffn_gate_exps",
        Source("blk.{n}.ffn_gate_up_exps", part="gate"),
        "blk.{n}.ffn_gate.{e}",
    ),
    "moe.up": (
        "blk.{n}.ffn_up_exps",
        Source("blk.{n}.ffn_gate_up_exps", part="up"),
        "blk.{n}.ffn_up.{e}",
    ),
    "moe.down": ("blk.{n}.ffn_down_exps", "blk.{n}.ffn_down.{e}"),
    "final_norm": "output_norm",
    "head": "output",
}
_INTERLEAVED_NAMES: Names = {
    **_NAMES,
    "attn.q": (
        Source("blk.{n}.attn_q", interleaved=True),
        Source("blk.{n}.attn_qkv", part="q", interleaved=True),
    ),
    "attn.k": (
        Source("blk.{n}.attn_k", interleaved=True),
        Source("blk.{n}.attn_qkv", part="k", interleaved=True),
    ),
}
# What comes before the feed-forward, by the name of Hugging Face: after the attention.
_OSS_NAMES: Names = {
    **_NAMES,
    "attn.sinks": "blk.{n}.attn_sinks",
    "ffn_norm": ("blk.{n}.post_attention_norm", "blk.{n}.ffn_norm"),
}
_PHI3_NAMES: Names = {
    **_NAMES,
    "ffn.gate": Source("blk.{n}.ffn_up", part="gate"),
    "ffn.up": Source("blk.{n}.ffn_up", part="up"),
}
# RoPE factors are part of the spec; the rest are tables that very old converters wrote.
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_BUFFERS = (*_ROPE_TENSORS, "blk.*.attn_rot_embd")


def layout(checkpoint: Checkpoint) -> Layout:
    return Layout(names_of(architecture(checkpoint)), prefixes=("",), buffers=_BUFFERS)


def names_of(architecture: str) -> Names:
    """How a file of this `general.architecture` calls its tensors."""
    names = _INTERLEAVED_NAMES if architecture in _INTERLEAVED else _NAMES
    special = {"phi3": _PHI3_NAMES, "gpt-oss": _OSS_NAMES, "seed_oss": _OSS_NAMES}
    return special.get(architecture, names)


def load_spec(
    checkpoint: Checkpoint, build: Mapping[str, Callable[[Config], DecoderSpec]]
) -> DecoderSpec:
    """build: the spec function of each model type."""
    metadata = GGUFConfig(checkpoint)
    spec = build[metadata.model_type](metadata.config())
    if metadata.model_type.startswith("gemma"):
        spec = _whole_norms(spec)
    layers = (metadata.as_stored(n, layer) for n, layer in enumerate(spec.layers))
    return replace(spec, layers=tuple(layers))


def _whole_norms(spec: DecoderSpec) -> DecoderSpec:
    """Converters add Gemma's 1 to the norm weights themselves."""

    def whole(norm: NormSpec) -> NormSpec:
        return replace(norm, offset=0.0)

    def of(layer: LayerSpec) -> LayerSpec:
        qk_norm = layer.attention.qk_norm
        mixer = replace(layer.attention, qk_norm=whole(qk_norm) if qk_norm else None)
        return replace(layer, norm=whole(layer.norm), mixer=mixer)

    return replace(spec, layers=tuple(map(of, spec.layers)), final_norm=whole(spec.final_norm))
