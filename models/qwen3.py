"""Qwen 3: no biases, RMSNorm on each head of q and k, a head size of its own (128)."""

from __future__ import annotations

from dataclasses import replace

from localllm.models import llama
from localllm.models.common import attention, decoder, feed_forward, rms_norm, sizes, upper_windows
from localllm.models.config import Config
from localllm.models.layout import Names
from localllm.spec import DecoderSpec, LayerSpec

NAMES: Names = {
    **llama.NAMES,
    "attn.q_norm": "layers.{n}.self_attn.q_norm",
    "attn.k_norm": "layers.{n}.self_attn.k_norm",
}


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config, head_dim=128), rms_norm(config)
    mixer = attention(config, size, qk_norm=norm)
    ffn = feed_forward(config)
    layers = [
        LayerSpec(mixer=replace(mixer, window=width), ffn=ffn, norm=norm)
        for width in upper_windows(config, size)
    ]
    return decoder("qwen3", config, size, layers, norm)
