"""GLM 4 (0414): norms before and after each sublayer, half of each head rotated in pairs."""

from __future__ import annotations

from dataclasses import replace

from localllm.models import phi3
from localllm.models.common import attention, decoder, feed_forward, rms_norm, sizes
from localllm.models.config import Config
from localllm.models.layout import Names
from localllm.models.llama import NAMES as LLAMA
from localllm.models.rope import rope
from localllm.spec import DecoderSpec, LayerSpec

NAMES: Names = {
    **LLAMA,
    "attn_post_norm": "layers.{n}.post_self_attn_layernorm",
    "ffn_post_norm": "layers.{n}.post_mlp_layernorm",
    "ffn.gate": phi3.NAMES["ffn.gate"],
    "ffn.up": phi3.NAMES["ffn.up"],
}


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config, head_dim=128), rms_norm(config, default=1.5625e-7)
    layer = LayerSpec(
        mixer=attention(
            config,
            size,
            rope=replace(rope(config, size.head_dim, share=0.5), interleaved=True),
            qkv_bias=config.flag("attention_bias", True),
            out_bias=False,
        ),
        ffn=feed_forward(config),
        norm=norm,
        post_norm=True,
    )
    return decoder("glm4", config, size, [layer] * size.layers, norm)
