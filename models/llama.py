"""Llama 1 to 3.x, and the many models that keep its shape (SmolLM2 among them)."""

from __future__ import annotations

from localllm.models.common import attention, decoder, feed_forward, rms_norm, sizes
from localllm.models.config import Config
from localllm.models.layout import Names
from localllm.spec import DecoderSpec, LayerSpec

NAMES: Names = {
    "embed": "embed_tokens",
    "attn_norm": "layers.{n}.input_layernorm",
    "attn.q": "layers.{n}.self_attn.q_proj",
    "attn.k": "layers.{n}.self_attn.k_proj",
    "attn.v": "layers.{n}.self_attn.v_proj",
    "attn.o": "layers.{n}.self_attn.o_proj",
    "ffn_norm": "layers.{n}.post_attention_layernorm",
    "ffn.gate": "layers.{n}.mlp.gate_proj",
    "ffn.up": "layers.{n}.mlp.up_proj",
    "ffn.down": "layers.{n}.mlp.down_proj",
    "final_norm": "norm",
    "head": "lm_head",
}


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), rms_norm(config)
    layer = LayerSpec(
        mixer=attention(config, size),
        ffn=feed_forward(config, bias=config.flag("mlp_bias", False)),
        norm=norm,
    )
    return decoder("llama", config, size, [layer] * size.layers, norm)
