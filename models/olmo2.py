"""OLMo 2: norms after the sublayers only, and over all heads of q and k together."""

from __future__ import annotations

from localllm.models import llama
from localllm.models.common import attention, decoder, feed_forward, rms_norm, sizes
from localllm.models.config import Config
from localllm.models.layout import Names
from localllm.spec import DecoderSpec, LayerSpec

NAMES: Names = {
    **llama.NAMES,
    "attn.q_norm": "layers.{n}.self_attn.q_norm",
    "attn.k_norm": "layers.{n}.self_attn.k_norm",
    "attn_post_norm": "layers.{n}.post_attention_layernorm",
    "ffn_post_norm": "layers.{n}.post_feedforward_layernorm",
}


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), rms_norm(config, default=1e-5)
    layer = LayerSpec(
        mixer=attention(config, size, qk_norm=norm, qk_norm_over="all"),
        ffn=feed_forward(config),
        norm=norm,
        pre_norm=False,
        post_norm=True,
    )
    return decoder("olmo2", config, size, [layer] * size.layers, norm)
