"""SmolLM 3: Llama with layers that have no positions (NoPE), every fourth unless listed."""

from __future__ import annotations

from dataclasses import replace

from localllm.models.common import (
    attention,
    decoder,
    feed_forward,
    rms_norm,
    sizes,
    window,
    windows,
)
from localllm.models.config import MAX_LAYERS, Config
from localllm.models.rope import rope
from localllm.spec import DecoderSpec, LayerSpec


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), rms_norm(config)
    mixer = attention(config, size, rope=rope(config, size.head_dim, theta=2000000.0))
    ffn = feed_forward(config, bias=config.flag("mlp_bias", False))
    has_rope = _has_rope(config, size.layers)
    width = window(config) if config.flag("use_sliding_window", False) else None
    layers = [
        LayerSpec(
            mixer=replace(mixer, window=window, rope=mixer.rope if rotates else None),
            ffn=ffn,
            norm=norm,
        )
        for rotates, window in zip(
            has_rope, windows(config, size, [not x for x in has_rope], width), strict=True
        )
    ]
    return decoder("smollm3", config, size, layers, norm, tied=True)


def _has_rope(config: Config, count: int) -> list[bool]:
    """`no_rope_layers` lists, its name notwithstanding, 1 for each layer with RoPE."""
    if not config.has("no_rope_layers"):
        step = config.integer("no_rope_layer_interval", 4, high=MAX_LAYERS)
        return [(n + 1) % step != 0 for n in range(count)]
    listed = config.items("no_rope_layers")
    if len(listed) < count or any(entry not in (0, 1) for entry in listed):
        raise config.bad("no_rope_layers", f"must list 0 or 1 for each of the {count} layers")
    return [bool(entry) for entry in listed[:count]]
