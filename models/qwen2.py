"""Qwen 2 and 2.5: Llama with biases on q, k and v, and windows in the upper layers if wished."""

from __future__ import annotations

from dataclasses import replace

from localllm.models.common import attention, decoder, feed_forward, rms_norm, sizes, upper_windows
from localllm.models.config import Config
from localllm.spec import DecoderSpec, LayerSpec


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), rms_norm(config)
    mixer = attention(config, size, qkv_bias=True, out_bias=False)
    ffn = feed_forward(config)
    layers = [
        LayerSpec(mixer=replace(mixer, window=width), ffn=ffn, norm=norm)
        for width in upper_windows(config, size)
    ]
    return decoder("qwen2", config, size, layers, norm)
