"""Qwen 3.5, text: three layers of gated delta nets, then one of gated attention, and so on.

The multimodal models nest the same config under `text_config`; their vision tower is left out. The
layer that predicts one token more (MTP) may serve as a draft head.
"""

from __future__ import annotations

from localllm.models import llama
from localllm.models.common import attention, decoder, feed_forward, rms_norm, sizes
from localllm.models.config import MAX_LAYERS, MAX_WIDTH, Config
from localllm.models.layout import Names, Source
from localllm.models.mtp import Mtp, names_of_layer
from localllm.models.rope import rope
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    GatedDeltaNetSpec,
    LayerSpec,
    NormSpec,
)
from localllm.spec.decoder import Mixer

_DELTA = "layers.{n}.linear_attn."

NAMES: Names = {
    **llama.NAMES,
    "attn.q": Source("layers.{n}.self_attn.q_proj", part="heads_q"),
    "attn.gate": Source("layers.{n}.self_attn.q_proj", part="heads_gate"),
    "attn.q_norm": "layers.{n}.self_attn.q_norm",
    "attn.k_norm": "layers.{n}.self_attn.k_norm",
    "delta.qkv": _DELTA + "in_proj_qkv",
    "delta.z": _DELTA + "in_proj_z",
    "delta.beta": _DELTA + "in_proj_b",
    "delta.decay": _DELTA + "in_proj_a",
    "delta.conv": Source(_DELTA + "conv1d", taps=3),
    "delta.rate": Source(_DELTA + "A_log", bare=True),
    "delta.step": Source(_DELTA + "dt_bias", bare=True),
    "delta.norm": _DELTA + "norm",
    "delta.o": _DELTA + "out_proj",
}
OTHER_PARTS = ("mtp.*", "visual.*", "model.visual.*")


def mtp(spec: DecoderSpec, names: Names = NAMES) -> Mtp:
    """A layer that attends, with norms of its own for what it is given."""
    index, _ = next(spec.attentions)
    return Mtp(
        layer=spec.layers[index],
        names=names_of_layer(names, 0, final_norm="norm"),
        prefixes=("mtp.", "model.mtp.", "language_model.mtp."),
        hidden_norm="pre_fc_norm_hidden",
        embedding_norm="pre_fc_norm_embedding",
        fuse="fc",
    )


def spec(config: Config) -> DecoderSpec:
    if config.has("text_config"):
        config = config.section("text_config")
    size, norm = sizes(config, head_dim=256), rms_norm(config, offset=1.0)
    ffn = feed_forward(config)
    layers = [LayerSpec(mixer=m, ffn=ffn, norm=norm) for m in mixers(config, norm)]
    return decoder("qwen3_5", config, size, layers, norm)


def mixers(config: Config, norm: NormSpec) -> list[Mixer]:
    """Of each layer, as `layer_types` say, or every fourth one attends."""
    size = sizes(config, handled=("shared_expert_intermediate_size",), head_dim=256)
    attends = attention(
        config, size, qk_norm=norm, gate=True, rope=rope(config, size.head_dim, share=0.25)
    )
    period = config.integer("full_attention_interval", 4, high=MAX_LAYERS)
    kinds = [
        "linear_attention" if (n + 1) % period else "full_attention" for n in range(size.layers)
    ]
    return _of_kinds(config, kinds, attends, _delta(config, norm))


def _of_kinds(
    config: Config, kinds: list[str], attends: AttentionSpec, delta: GatedDeltaNetSpec
) -> list[Mixer]:
    known: dict[str, Mixer] = {"full_attention": attends, "linear_attention": delta}
    if config.has("layer_types"):
        kinds = config.items("layer_types", length=len(kinds))
    for kind in kinds:
        if kind not in known:
            raise config.unsupported("layer_types", kind, known=known)
    if "full_attention" not in kinds:
        raise config.bad("layer_types", "has no layer that attends")
    return [known[kind] for kind in kinds]


def _delta(config: Config, norm: NormSpec) -> GatedDeltaNetSpec:
    key_heads = config.integer("linear_num_key_heads", 16, high=MAX_WIDTH)
    value_heads = config.integer("linear_num_value_heads", 32, high=MAX_WIDTH)
    if value_heads % key_heads:
        raise config.bad(
            "linear_num_value_heads", f"is {value_heads}, no multiple of the {key_heads} key heads"
        )
    if config.activation("hidden_act", "silu") != "silu":
        raise config.unsupported("hidden_act", config.values["hidden_act"], known=("silu",))
    return GatedDeltaNetSpec(
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=config.integer("linear_key_head_dim", 128, high=MAX_WIDTH),
        value_dim=config.integer("linear_value_head_dim", 128, high=MAX_WIDTH),
        kernel=config.integer("linear_conv_kernel_dim", 4, low=2, high=64),
        eps=norm.eps,
    )
