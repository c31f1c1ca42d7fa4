"""Phi 3 and 4: Llama with fused matrices, partial rotary and LongRoPE."""

from __future__ import annotations

from localllm.models import llama
from localllm.models.common import attention, decoder, feed_forward, rms_norm, sizes, window
from localllm.models.config import Config
from localllm.models.layout import Names, Source
from localllm.models.rope import rope
from localllm.spec import DecoderSpec, LayerSpec

NAMES: Names = {
    **llama.NAMES,
    "attn.q": Source("layers.{n}.self_attn.qkv_proj", part="q"),
    "attn.k": Source("layers.{n}.self_attn.qkv_proj", part="k"),
    "attn.v": Source("layers.{n}.self_attn.qkv_proj", part="v"),
    "ffn.gate": Source("layers.{n}.mlp.gate_up_proj", part="gate"),
    "ffn.up": Source("layers.{n}.mlp.gate_up_proj", part="up"),
}


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), rms_norm(config, default=1e-5)
    layer = LayerSpec(
        mixer=attention(
            config,
            size,
            # The first Phi 3 checkpoints call LongRoPE by these names.
            rope=rope(config, size.head_dim, aliases={"su": "longrope", "yarn": "longrope"}),
            window=window(config),
            qkv_bias=False,
            out_bias=False,
        ),
        ffn=feed_forward(config),
        norm=norm,
    )
    return decoder("phi3", config, size, [layer] * size.layers, norm)
