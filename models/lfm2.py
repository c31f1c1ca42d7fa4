"""LFM2: gated short convolutions, and attention in some layers between them."""

from __future__ import annotations

from localllm.models.common import attention, decoder, sizes
from localllm.models.config import MAX_WIDTH, Config
from localllm.models.layout import Names, Source
from localllm.models.rope import rope
from localllm.spec import (
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
    ShortConvSpec,
)
from localllm.spec.decoder import Mixer

NAMES: Names = {
    "embed": "embed_tokens",
    "attn_norm": "layers.{n}.operator_norm",
    "attn.q": "layers.{n}.self_attn.q_proj",
    "attn.k": "layers.{n}.self_attn.k_proj",
    "attn.v": "layers.{n}.self_attn.v_proj",
    "attn.o": "layers.{n}.self_attn.out_proj",
    "attn.q_norm": "layers.{n}.self_attn.q_layernorm",
    "attn.k_norm": "layers.{n}.self_attn.k_layernorm",
    "conv.in": "layers.{n}.conv.in_proj",
    "conv.out": "layers.{n}.conv.out_proj",
    "conv.taps.weight": Source("layers.{n}.conv.conv", taps=3),
    "conv.taps.bias": "layers.{n}.conv.conv",
    "ffn_norm": "layers.{n}.ffn_norm",
    "ffn.gate": "layers.{n}.feed_forward.w1",
    "ffn.up": "layers.{n}.feed_forward.w3",
    "ffn.down": "layers.{n}.feed_forward.w2",
    "final_norm": "embedding_norm",
    "head": "lm_head",
}


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), rms_norm(config)
    ffn = FeedForwardSpec(hidden=_hidden(config))
    layers = [LayerSpec(mixer=mixer, ffn=ffn, norm=norm) for mixer in mixers(config, norm)]
    return decoder("lfm2", config, size, layers, norm, tied=tied(config))


def rms_norm(config: Config) -> NormSpec:
    return NormSpec(eps=config.number("norm_eps", 1e-5, high=1.0))


def tied(config: Config) -> bool:
    """What a config that does not speak of `tie_word_embeddings` says."""
    return config.flag("tie_embedding", True)


def mixers(config: Config, norm: NormSpec) -> list[Mixer]:
    """Of each layer, as `layer_types` or, in older configs, `full_attn_idxs` say."""
    size = sizes(config)
    attends = attention(
        config, size, qk_norm=norm, rope=rope(config, size.head_dim, theta=1000000.0)
    )
    conv = ShortConvSpec(
        channels=size.hidden,
        kernel=config.integer("conv_L_cache", 3, low=2, high=64),
        bias=config.flag("conv_bias", False),
    )
    known: dict[str, Mixer] = {"full_attention": attends, "conv": conv}
    if config.has("layer_types"):
        kinds = config.items("layer_types", length=size.layers)
    elif config.has("full_attn_idxs"):
        attending = config.items("full_attn_idxs")
        kinds = ["full_attention" if n in attending else "conv" for n in range(size.layers)]
    else:
        kinds = ["full_attention"] * size.layers
    for kind in kinds:
        if kind not in known:
            raise config.unsupported("layer_types", kind, known=known)
    if "full_attention" not in kinds:
        raise config.bad("layer_types", "has no layer that attends")
    return [known[kind] for kind in kinds]


def _hidden(config: Config) -> int:
    """The feed-forward's size: a share of what the config names, rounded up."""
    key = "block_ff_dim" if config.has("block_ff_dim") else "intermediate_size"
    hidden = config.integer(key, 12288, high=MAX_WIDTH)
    if not config.flag("block_auto_adjust_ff_dim", True):
        return hidden
    hidden = int(2 * hidden / 3)
    hidden = int(config.number("block_ffn_dim_multiplier", 1.0) * hidden)
    step = config.integer("block_multiple_of", 256, high=MAX_WIDTH)
    return step * (-(-hidden // step))
