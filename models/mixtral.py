"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from localllm.models import llama
from localllm.models.common import attention, decoder, experts, rms_norm, sizes, window
from localllm.models.config import Config
from localllm.models.layout import Names, Source
from localllm.models.rope import rope
from localllm.spec import DecoderSpec, LayerSpec

_MOE = "layers.{n}.block_sparse_moe."

# One matrix per expert as on the hub, then transformers' own fused form, then MLX's.
NAMES: Names = {
    **llama.NAMES,
    "moe.router": (_MOE + "gate", "layers.{n}.mlp.gate"),
    "moe.gate": (
        _MOE + "experts.{e}.w1",
        Source("layers.{n}.mlp.experts.gate_up_proj", part="gate", bare=True),
        _MOE + "switch_mlp.gate_proj",
    ),
    "moe.up": (
        _MOE + "experts.{e}.w3",
        Source("layers.{n}.mlp.experts.gate_up_proj", part="up", bare=True),
        _MOE + "switch_mlp.up_proj",
    ),
    "moe.down": (
        _MOE + "experts.{e}.w2",
        Source("layers.{n}.mlp.experts.down_proj", bare=True),
        _MOE + "switch_mlp.down_proj",
    ),
}


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), rms_norm(config, default=1e-5)
    layer = LayerSpec(
        mixer=attention(
            config,
            size,
            rope=rope(config, size.head_dim, theta=1000000.0),
            window=window(config),
            qkv_bias=False,
            out_bias=False,
        ),
        ffn=experts(config, hidden_key="intermediate_size", renormalize=True),
        norm=norm,
    )
    return decoder("mixtral", config, size, [layer] * size.layers, norm)
