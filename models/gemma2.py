"""Gemma 2: norms before and after each sublayer, softcaps, every second layer with a window."""

from __future__ import annotations

from dataclasses import replace

from localllm.models import llama
from localllm.models.common import attention, decoder, rms_norm, sizes, window, windows
from localllm.models.config import MAX_WIDTH, Config
from localllm.models.layout import Names
from localllm.spec import DecoderSpec, FeedForwardSpec, LayerSpec

SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")

NAMES: Names = {
    **llama.NAMES,
    "attn_post_norm": "layers.{n}.post_attention_layernorm",
    "ffn_norm": "layers.{n}.pre_feedforward_layernorm",
    "ffn_post_norm": "layers.{n}.post_feedforward_layernorm",
}


def spec(config: Config) -> DecoderSpec:
    size = sizes(config, handled=SOFTCAPS, head_dim=256)
    norm = rms_norm(config, offset=1.0)
    mixer = attention(
        config,
        size,
        scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        softcap=softcap(config, "attn_logit_softcapping", 50.0),
    )
    pattern = [n % 2 == 0 for n in range(size.layers)]
    layers = [
        LayerSpec(mixer=replace(mixer, window=width), ffn=geglu(config), norm=norm, post_norm=True)
        for width in windows(config, size, pattern, window(config, default=4096))
    ]
    return decoder(
        "gemma2",
        config,
        size,
        layers,
        norm,
        tied=True,
        embed_scale=size.hidden**0.5,
        logit_softcap=softcap(config, "final_logit_softcapping", 30.0),
    )


def geglu(config: Config, **defaults: int) -> FeedForwardSpec:
    return FeedForwardSpec(
        hidden=config.integer("intermediate_size", *defaults.values(), high=MAX_WIDTH),
        activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
    )


def softcap(config: Config, key: str, default: float | None) -> float | None:
    """null turns the cap off; a missing key takes the default."""
    if key not in config:
        return default
    return config.number(key) if config.has(key) else None
