"""Ministral 3: Mistral with YaRN and queries that grow with their position, as Llama 4's do.

Published inside `mistral3`, which adds a vision tower; older ones of that name hold a Mistral.
"""

from __future__ import annotations

from localllm.models import llama, mistral
from localllm.models.common import attention, decoder, feed_forward, rms_norm, sizes, window
from localllm.models.config import MAX_CONTEXT, Config
from localllm.models.rope import parameters_of, rope_from
from localllm.spec import DecoderSpec, LayerSpec

NAMES = llama.NAMES
OTHER_PARTS = tuple(
    f"{prefix}{part}.*"
    for prefix in ("", "model.")
    for part in ("vision_tower", "multi_modal_projector")
)
# What transformers assumes where a config has no RoPE parameters.
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config, head_dim=128), rms_norm(config, default=1e-5)
    parameters = parameters_of(config)
    if not parameters.values:
        parameters = Config(_ROPE, config.source, at="rope_parameters.")
    growth = parameters.number("llama_4_scaling_beta", 0.0, above=-1e-9)
    layer = LayerSpec(
        mixer=attention(
            config,
            size,
            rope=rope_from(config, parameters, size.head_dim, 1000000.0),
            window=window(config),
            qkv_bias=False,
            out_bias=False,
            query_growth=growth,
            query_context=parameters.integer(
                "original_max_position_embeddings", *(() if growth else (1,)), high=MAX_CONTEXT
            ),
        ),
        ffn=feed_forward(config),
        norm=norm,
    )
    return decoder("ministral3", config, size, [layer] * size.layers, norm)


def wrapped_spec(config: Config) -> DecoderSpec:
    """Of `mistral3`: the language model under `text_config`."""
    text = config.section("text_config")
    kinds = {"ministral3": spec, "mistral": mistral.spec}
    kind = text.text("model_type", "mistral")
    if kind not in kinds:
        raise text.unsupported("model_type", kind, known=tuple(kinds))
    return kinds[kind](text)
