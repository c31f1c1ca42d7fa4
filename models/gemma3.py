"""Gemma 3, text: five layers with a window and a RoPE of their own, then one without.

The multimodal models nest the same config under `text_config`; their vision tower is left out.
"""

from __future__ import annotations

from dataclasses import replace

from localllm.models import gemma2
from localllm.models.common import attention, decoder, rms_norm, sizes, window, windows
from localllm.models.config import MAX_LAYERS, Config
from localllm.models.layout import Names
from localllm.models.rope import rope_from
from localllm.spec import DecoderSpec, LayerSpec, RopeSpec

NAMES: Names = {
    **gemma2.NAMES,
    "attn.q_norm": "layers.{n}.self_attn.q_norm",
    "attn.k_norm": "layers.{n}.self_attn.k_norm",
}
OTHER_PARTS = tuple(
    f"{prefix}{part}.*"
    for prefix in ("", "model.")
    for part in ("vision_tower", "multi_modal_projector")
)
# What transformers assumes, and published configs leave out.
_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}


def spec(config: Config) -> DecoderSpec:
    if config.has("text_config"):
        config = config.section("text_config")
    size = sizes(config, handled=("final_logit_softcapping",), **_DEFAULTS)
    norm = rms_norm(config, offset=1.0)
    mixer = attention(
        config,
        size,
        scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        qk_norm=norm,
        rope=_rope(config, size.head_dim, "full_attention", "rope_theta", 1000000.0),
    )
    local = _rope(config, size.head_dim, "sliding_attention", "rope_local_base_freq", 10000.0)
    period = config.integer("sliding_window_pattern", 6, high=MAX_LAYERS)
    pattern = [(n + 1) % period != 0 for n in range(size.layers)]
    ffn = gemma2.geglu(config, intermediate_size=9216)
    layers = [
        LayerSpec(
            mixer=mixer if width is None else replace(mixer, window=width, rope=local),
            ffn=ffn,
            norm=norm,
            post_norm=True,
        )
        for width in windows(config, size, pattern, window(config, default=4096))
    ]
    return decoder(
        "gemma3",
        config,
        size,
        layers,
        norm,
        tied=True,
        embed_scale=size.hidden**0.5,
        logit_softcap=gemma2.softcap(config, "final_logit_softcapping", None),
    )


def _rope(config: Config, head_dim: int, kind: str, base_key: str, base: float) -> RopeSpec:
    """Of one kind of layers. Older configs scale the full ones and name both bases apart."""
    base = config.number(base_key, base, above=1)
    if config.has("rope_parameters") and config.section("rope_parameters").values:
        parameters = config.section("rope_parameters").section(kind)
    elif kind == "full_attention" and config.has("rope_scaling"):
        parameters = config.section("rope_scaling")
    else:
        parameters = Config({"rope_theta": base}, config.source)
    return rope_from(config, parameters, head_dim, base)
