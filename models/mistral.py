"""Mistral 7B and its kin: Llama, with a sliding window in all layers (4096 if not said)."""

from __future__ import annotations

from localllm.models.common import attention, decoder, feed_forward, rms_norm, sizes, window
from localllm.models.config import Config
from localllm.spec import DecoderSpec, LayerSpec


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), rms_norm(config)
    if config.has("layer_types"):
        raise config.unsupported("layer_types", config.values["layer_types"])
    layer = LayerSpec(
        mixer=attention(
            config,
            size,
            window=window(config, default=4096),
            qkv_bias=False,
            out_bias=False,
        ),
        ffn=feed_forward(config),
        norm=norm,
    )
    return decoder("mistral", config, size, [layer] * size.layers, norm)
