"""StarCoder 2: LayerNorm, a plain GELU feed-forward, biases everywhere, a window if said."""

from __future__ import annotations

from localllm.models import llama
from localllm.models.common import attention, decoder, sizes, window
from localllm.models.config import MAX_WIDTH, Config
from localllm.models.layout import Names
from localllm.spec import DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec

NAMES: Names = {
    **llama.NAMES,
    "ffn.up": "layers.{n}.mlp.c_fc",
    "ffn.down": "layers.{n}.mlp.c_proj",
}


def spec(config: Config) -> DecoderSpec:
    for key, only in (("mlp_type", "default"), ("norm_type", "layer_norm")):
        if config.text(key, only) != only:
            raise config.unsupported(key, config.values[key], known=(only,))
    size = sizes(config)
    bias = config.flag("use_bias", True)
    norm = NormSpec("layer", eps=config.number("norm_epsilon", 1e-5, high=1.0), bias=True)
    layer = LayerSpec(
        mixer=attention(config, size, window=window(config), qkv_bias=bias, out_bias=bias),
        ffn=FeedForwardSpec(
            hidden=config.integer("intermediate_size", high=MAX_WIDTH),
            activation=config.activation("hidden_act", "gelu_pytorch_tanh"),
            gated=False,
            bias=bias,
        ),
        norm=norm,
    )
    return decoder("starcoder2", config, size, [layer] * size.layers, norm, tied=True)
