"""Granite 3: Llama with multipliers on embeddings, attention, residuals and logits."""

from __future__ import annotations

from localllm.models.common import attention, decoder, feed_forward, rms_norm, sizes
from localllm.models.config import Config
from localllm.spec import DecoderSpec, LayerSpec


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), rms_norm(config)
    layer = LayerSpec(
        mixer=attention(config, size, scale=config.number("attention_multiplier", 1.0)),
        ffn=feed_forward(config, bias=config.flag("mlp_bias", False)),
        norm=norm,
        residual_scale=config.number("residual_multiplier", 1.0),
    )
    return decoder(
        "granite",
        config,
        size,
        [layer] * size.layers,
        norm,
        embed_scale=config.number("embedding_multiplier", 1.0),
        logit_scale=1.0 / config.number("logits_scaling", 1.0),
    )
