"""GGUF files: llama.cpp's tensor names and conventions, undone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from localllm.checkpoint.base import Checkpoint
from localllm.models.config import Config
from localllm.models.gguf_config import GGUFConfig
from localllm.models.layout import Layout, Names, Source
from localllm.spec import AttentionSpec, DecoderSpec, LayerSpec, NormSpec

# Converters reorder the rows of q and k for these, so that RoPE turns neighbouring entries.
_INTERLEAVED = ("llama", "smollm3", "granite", "mistral3")

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
_AFTER: Names = {"ffn_norm": ("blk.{n}.post_attention_norm", "blk.{n}.ffn_norm")}
_OSS_NAMES: Names = {**_NAMES, **_AFTER, "attn.sinks": "blk.{n}.attn_sinks"}
_SIGMOID: Names = {
    "moe.selection_bias": tuple(
        Source(f"blk.{{n}}.exp_probs_b{ending}", bare=True) for ending in (".bias", "")
    )
}
_SHARED: Names = {
    "moe.shared.gate": "blk.{n}.ffn_gate_shexp",
    "moe.shared.up": "blk.{n}.ffn_up_shexp",
    "moe.shared.down": "blk.{n}.ffn_down_shexp",
    "moe.shared_gate": Source("blk.{n}.ffn_gate_inp_shexp", row=True),
}
_GLM4_MOE_NAMES: Names = {**_NAMES, **_AFTER, **_SIGMOID, **_SHARED}
_LFM2_NAMES: Names = {
    **_NAMES,
    **_SIGMOID,
    "conv.in": "blk.{n}.shortconv.in_proj",
    "conv.out": "blk.{n}.shortconv.out_proj",
    "conv.taps": Source("blk.{n}.shortconv.conv", taps=2),
    "final_norm": ("token_embd_norm", "output_norm"),
}


def _delta(*, tiled: bool) -> Names:
    """Mixers of Qwen 3.5 and Qwen3-Next. Older files of the latter keep q, k, v and z in one."""
    at = "blk.{n}."
    return {
        **_NAMES,
        **_AFTER,
        **_SHARED,
        "attn.q": Source(at + "attn_q", part="heads_q"),
        "attn.gate": Source(at + "attn_q", part="heads_gate"),
        "attn.k": at + "attn_k",
        "attn.v": at + "attn_v",
        "delta.qkv": (
            Source(at + "attn_qkv", tiled=tiled),
            Source(at + "ssm_in", part="groups_qkv"),
        ),
        "delta.z": (Source(at + "attn_gate", tiled=tiled), Source(at + "ssm_in", part="groups_z")),
        "delta.beta": Source(at + "ssm_beta", tiled=True)
        if tiled
        else Source(at + "ssm_ba", part="groups_beta"),
        "delta.decay": Source(at + "ssm_alpha", tiled=True)
        if tiled
        else Source(at + "ssm_ba", part="groups_decay"),
        "delta.conv": Source(at + "ssm_conv1d", taps=2, tiled=tiled),
        "delta.rate": Source(at + "ssm_a", bare=True, tiled=tiled, negative_exp=True),
        "delta.step": Source(at + "ssm_dt.bias", bare=True, tiled=tiled),
        "delta.norm": at + "ssm_norm",
        "delta.o": Source(at + "ssm_out", tiled=tiled),
    }


_GEMMA4_NAMES: Names = {
    **_NAMES,
    "moe.router_norm": Source("blk.{n}.ffn_gate_inp.scale", bare=True),
    "moe.expert_scale": Source("blk.{n}.ffn_down_exps.scale", bare=True),
    "moe.shared.gate": "blk.{n}.ffn_gate",
    "moe.shared.up": "blk.{n}.ffn_up",
    "moe.shared.down": "blk.{n}.ffn_down",
    "moe.shared_post_norm": "blk.{n}.post_ffw_norm_1",
    "moe.expert_norm": "blk.{n}.pre_ffw_norm_2",
    "moe.expert_post_norm": "blk.{n}.post_ffw_norm_2",
    "per_layer_inputs.embed": "per_layer_token_embd",
    "per_layer_inputs.up": "per_layer_model_proj",
    "per_layer_inputs.norm": "per_layer_proj_norm",
    "per_layer.up": "blk.{n}.proj",
    "per_layer.gate": "blk.{n}.inp_gate",
    "per_layer_norm": "blk.{n}.post_norm",
    "scalar": "blk.{n}.layer_output_scale",
}
_FUSED_GATE_NAMES: Names = {
    **_NAMES,
    "ffn.gate": Source("blk.{n}.ffn_up", part="gate"),
    "ffn.up": Source("blk.{n}.ffn_up", part="up"),
}
_SPECIAL: Mapping[str, Names] = {
    "phi3": _FUSED_GATE_NAMES,
    "glm4": _FUSED_GATE_NAMES,
    "gpt-oss": _OSS_NAMES,
    "seed_oss": _OSS_NAMES,
    "glm4moe": _GLM4_MOE_NAMES,
    "lfm2": _LFM2_NAMES,
    "lfm2moe": _LFM2_NAMES,
    "qwen3next": _delta(tiled=False),
    "qwen35": _delta(tiled=True),
    "qwen35moe": _delta(tiled=True),
    "gemma4": _GEMMA4_NAMES,
}
# RoPE factors are part of the spec; the rest are tables that very old converters wrote.
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# What NVFP4 says of the inputs it was made for does not change the weights.
_BUFFERS = (*_ROPE_TENSORS, "blk.*.attn_rot_embd", "*.input_scale")


def layout(checkpoint: Checkpoint) -> Layout:
    metadata = GGUFConfig(checkpoint)
    # Layers that guess several tokens at once follow the model's own.
    guessing = tuple(f"blk.{n}.*" for n in metadata.guessing_layers)
    return Layout(
        names_of(metadata.architecture), prefixes=("",), buffers=_BUFFERS, other_parts=guessing
    )


def names_of(architecture: str) -> Names:
    """How a file of this `general.architecture` calls its tensors."""
    names = _INTERLEAVED_NAMES if architecture in _INTERLEAVED else _NAMES
    return _SPECIAL.get(architecture, names)


def load_spec(
    checkpoint: Checkpoint, build: Mapping[str, Callable[[Config], DecoderSpec]]
) -> DecoderSpec:
    """build: the spec function of each model type."""
    metadata = GGUFConfig(checkpoint)
    spec = _whole_norms(build[metadata.model_type](metadata.config()))
    layers = (metadata.as_stored(n, layer) for n, layer in enumerate(spec.layers))
    return replace(spec, layers=tuple(layers))


def _whole_norms(spec: DecoderSpec) -> DecoderSpec:
    """Converters add the 1 of Gemma, Qwen3-Next and Qwen 3.5 to the norm weights themselves."""

    def whole(norm: NormSpec) -> NormSpec:
        return replace(norm, offset=0.0)

    def of(layer: LayerSpec) -> LayerSpec:
        mixer = layer.mixer
        if isinstance(mixer, AttentionSpec) and mixer.qk_norm is not None:
            mixer = replace(mixer, qk_norm=whole(mixer.qk_norm))
        return replace(layer, norm=whole(layer.norm), mixer=mixer)

    return replace(spec, layers=tuple(map(of, spec.layers)), final_norm=whole(spec.final_norm))
