"""OLMo 3: OLMo 2 with windows; only the layers that see everything stretch their RoPE."""

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
from localllm.models.config import Config
from localllm.models.rope import parameters_of, rope_from
from localllm.spec import DecoderSpec, LayerSpec, RopeSpec

_THETA = 500000.0


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), rms_norm(config, default=1e-5)
    full = attention(
        config,
        size,
        rope=_rope(config, size.head_dim, "full_attention"),
        qk_norm=norm,
        qk_norm_over="all",
    )
    local = _rope(config, size.head_dim, "sliding_attention")
    pattern = [(n + 1) % 4 != 0 for n in range(size.layers)]
    ffn = feed_forward(config)
    layers = [
        LayerSpec(
            mixer=full if width is None else replace(full, window=width, rope=local),
            ffn=ffn,
            norm=norm,
            pre_norm=False,
            post_norm=True,
        )
        for width in windows(config, size, pattern, window(config, default=4096))
    ]
    return decoder("olmo3", config, size, layers, norm)


def _rope(config: Config, head_dim: int, kind: str) -> RopeSpec:
    """`rope_scaling` is meant for the full layers; `rope_parameters` has a set for each kind."""
    parameters = parameters_of(config)
    if parameters.has(kind):
        parameters = parameters.section(kind)
    elif kind == "sliding_attention":
        parameters = Config({}, config.source)
    return rope_from(config, parameters, head_dim, _THETA)
