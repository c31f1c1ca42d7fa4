"""Seed-OSS: Llama with biases on q, k and v."""

from __future__ import annotations

from localllm.models.common import attention, decoder, feed_forward, rms_norm, sizes
from localllm.models.config import Config
from localllm.spec import DecoderSpec, LayerSpec


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config, head_dim=128), rms_norm(config)
    layer = LayerSpec(
        mixer=attention(
            config,
            size,
            qkv_bias=config.flag("attention_bias", True),
            out_bias=config.flag("attention_out_bias", False),
        ),
        ffn=feed_forward(config, bias=config.flag("mlp_bias", False)),
        norm=norm,
    )
    return decoder("seed_oss", config, size, [layer] * size.layers, norm)
