"""gpt-oss: experts with biases and a clamped SwiGLU, every other layer with a window, sinks."""

from __future__ import annotations

from dataclasses import replace

from localllm.models import llama
from localllm.models.common import (
    attention,
    decoder,
    experts,
    rms_norm,
    sizes,
    window,
    windows,
)
from localllm.models.config import Config
from localllm.models.layout import Names, Part, Source
from localllm.models.rope import parameters_of, rope_from
from localllm.spec import DecoderSpec, LayerSpec, RopeSpec

_EXPERTS = "layers.{n}.mlp.experts."


def _gate_up(part: Part) -> tuple[Source, ...]:
    """In MXFP4 as published, in the dense form of transformers, and as MLX splits it."""
    return (
        Source(_EXPERTS + "gate_up_proj_blocks", part=part, bare=True, alternate=True),
        Source(_EXPERTS + "gate_up_proj", part=part, bare=True, alternate=True, inputs_first=True),
        Source(f"{_EXPERTS}{part}_proj"),
    )


def _gate_up_bias(part: Part) -> tuple[Source, ...]:
    return (
        Source(_EXPERTS + "gate_up_proj_bias", part=part, bare=True, alternate=True),
        Source(f"{_EXPERTS}{part}_proj"),
    )


NAMES: Names = {
    **llama.NAMES,
    "attn.sinks": Source("layers.{n}.self_attn.sinks", bare=True),
    "moe.router": "layers.{n}.mlp.router",
    "moe.gate": _gate_up("gate"),
    "moe.up": _gate_up("up"),
    "moe.down": (
        Source(_EXPERTS + "down_proj_blocks", bare=True),
        Source(_EXPERTS + "down_proj", bare=True, inputs_first=True),
        Source(_EXPERTS + "down_proj"),
    ),
    "moe.gate.bias": _gate_up_bias("gate"),
    "moe.up.bias": _gate_up_bias("up"),
    "moe.down.bias": (
        Source(_EXPERTS + "down_proj_bias", bare=True),
        Source(_EXPERTS + "down_proj"),
    ),
}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def spec(config: Config) -> DecoderSpec:
    for key, known in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if config.number(key, known) != known:
            raise config.unsupported(key, config.values[key])
    size, norm = sizes(config, head_dim=64), rms_norm(config, default=1e-5)
    bias = config.flag("attention_bias", True)
    mixer = attention(
        config, size, rope=_rope(config, size.head_dim), qkv_bias=bias, out_bias=bias, sinks=True
    )
    ffn = replace(
        experts(config, hidden_key="intermediate_size", renormalize=True),
        activation="clamped_swiglu",
        bias=True,
    )
    pattern = [n % 2 == 0 for n in range(size.layers)]
    layers = [
        LayerSpec(mixer=replace(mixer, window=width), ffn=ffn, norm=norm)
        for width in windows(config, size, pattern, window(config, default=128))
    ]
    return decoder("gpt_oss", config, size, layers, norm)


def _rope(config: Config, head_dim: int) -> RopeSpec:
    parameters = parameters_of(config)
    if not parameters.values:
        parameters = Config(_ROPE, config.source)
    return rope_from(config, parameters, head_dim, 150000.0)
