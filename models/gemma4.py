"""Gemma 4, text: dense, with experts beside a dense feed-forward (26B-A4B), or with embeddings for
each layer and keys that later layers share (E2B, E4B).

The multimodal models nest the same config under `text_config`; their towers are left out.
"""

from __future__ import annotations

from dataclasses import replace

from localllm.models import gemma2
from localllm.models.common import Sizes, attention, decoder, rms_norm, sizes, window, windows
from localllm.models.config import MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, Config
from localllm.models.layout import Names, Source
from localllm.models.rope import rope_from
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    MoESpec,
    PerLayerSpec,
    RopeSpec,
)
from localllm.spec.decoder import Activation

_EXPERTS = "layers.{n}.experts."

NAMES: Names = {
    **gemma2.NAMES,
    "attn.q_norm": "layers.{n}.self_attn.q_norm",
    "attn.k_norm": "layers.{n}.self_attn.k_norm",
    "moe.router": "layers.{n}.router.proj",
    "moe.router_norm": Source("layers.{n}.router.scale", bare=True),
    "moe.expert_scale": Source("layers.{n}.router.per_expert_scale", bare=True),
    "moe.gate": Source(_EXPERTS + "gate_up_proj", part="gate", bare=True),
    "moe.up": Source(_EXPERTS + "gate_up_proj", part="up", bare=True),
    "moe.down": Source(_EXPERTS + "down_proj", bare=True),
    "moe.shared.gate": "layers.{n}.mlp.gate_proj",
    "moe.shared.up": "layers.{n}.mlp.up_proj",
    "moe.shared.down": "layers.{n}.mlp.down_proj",
    "moe.shared_post_norm": "layers.{n}.post_feedforward_layernorm_1",
    "moe.expert_norm": "layers.{n}.pre_feedforward_layernorm_2",
    "moe.expert_post_norm": "layers.{n}.post_feedforward_layernorm_2",
    "per_layer_inputs.embed": "embed_tokens_per_layer",
    "per_layer_inputs.up": "per_layer_model_projection",
    "per_layer_inputs.norm": "per_layer_projection_norm",
    "per_layer.up": "layers.{n}.per_layer_projection",
    "per_layer.gate": "layers.{n}.per_layer_input_gate",
    "per_layer_norm": "layers.{n}.post_per_layer_input_norm",
    "scalar": Source("layers.{n}.layer_scalar", bare=True),
}
OTHER_PARTS = tuple(
    f"{prefix}{part}.*"
    for prefix in ("", "model.")
    for part in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
)
# What transformers assumes, and published configs may leave out.
_DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1000000.0,
    },
}


def spec(config: Config) -> DecoderSpec:
    if config.has("text_config"):
        config = config.section("text_config")
    handled = ("final_logit_softcapping", "use_bidirectional_attention")
    size = sizes(config, handled=handled, **_DEFAULTS)
    if config.values.get("use_bidirectional_attention") not in (None, "vision"):
        raise config.unsupported(
            "use_bidirectional_attention", config.values["use_bidirectional_attention"]
        )
    norm = rms_norm(config)
    slides = [(n + 1) % 6 != 0 for n in range(size.layers)]
    widths = windows(config, size, slides, window(config, default=512))
    widths[-1] = None  # as transformers: the last layer sees everything, whatever the config says
    shared = config.integer("num_kv_shared_layers", 0, low=0, high=MAX_LAYERS)
    sources = _kv_sources(config, widths, size.layers - shared)
    per_layer = config.integer("hidden_size_per_layer_input", 256, low=0, high=MAX_WIDTH)
    layers = [
        LayerSpec(
            mixer=_attention(config, size, n, width, source),
            ffn=_feed_forward(config, size.hidden, shares=source is not None),
            norm=norm,
            post_norm=True,
            scalar=True,
        )
        for n, (width, source) in enumerate(zip(widths, sources, strict=True))
    ]
    own = None
    if per_layer:
        vocab = config.integer("vocab_size_per_layer_input", 262144, high=MAX_VOCAB)
        if vocab < size.vocab:
            raise config.bad("vocab_size_per_layer_input", f"is {vocab}, less than vocab_size")
        own = PerLayerSpec(per_layer, vocab, _activation(config))
    return decoder(
        "gemma4",
        config,
        size,
        layers,
        norm,
        tied=True,
        embed_scale=size.hidden**0.5,
        logit_softcap=gemma2.softcap(config, "final_logit_softcapping", None),
        per_layer=own,
    )


def _kv_sources(config: Config, widths: list[int | None], first: int) -> list[int | None]:
    """Layers from `first` on attend to the keys of the last layer before it of their own kind."""
    sources: list[int | None] = [None] * len(widths)
    for n in range(max(first, 0), len(widths)):
        owners = [m for m in range(first) if widths[m] == widths[n]]
        if not owners:
            raise config.bad("num_kv_shared_layers", f"leaves layer {n} no layer to share with")
        sources[n] = owners[-1]
    return sources


def _attention(
    config: Config, size: Sizes, layer: int, width: int | None, source: int | None
) -> AttentionSpec:
    """Layers that see everything have heads of another size, and may take keys for values."""
    kind = "full_attention" if width is None else "sliding_attention"
    keys_for_values = width is None and config.flag("attention_k_eq_v", False)
    head_dim, kv_heads = size.head_dim, size.kv_heads
    if config.has("per_layer_config"):  # as transformers saves it
        own = config.section("per_layer_config")
        if own.has(str(layer)):
            own = own.section(str(layer))
            if unknown := own.values.keys() - {"head_dim", "num_key_value_heads"}:
                raise own.unsupported(min(unknown), own.values[min(unknown)])
            head_dim = own.integer("head_dim", head_dim, high=MAX_WIDTH)
            kv_heads = own.integer("num_key_value_heads", kv_heads, high=size.heads)
    elif width is None:
        head_dim = config.integer("global_head_dim", 512, high=MAX_WIDTH)
        if keys_for_values:
            kv_heads = config.integer("num_global_key_value_heads", kv_heads, high=size.heads)
    if size.heads % kv_heads:
        raise config.bad("num_global_key_value_heads", f"is {kv_heads} for {size.heads} heads")
    size = replace(size, head_dim=head_dim, kv_heads=kv_heads)
    norm = rms_norm(config)
    return attention(
        config,
        size,
        scale=1.0,
        qk_norm=norm,
        v_norm=norm.eps,
        v_from_k=keys_for_values,
        window=width,
        shared_kv=source,
        rope=_rope(config, size.head_dim, kind),
    )


def _rope(config: Config, head_dim: int, kind: str) -> RopeSpec:
    values = _ROPES[kind]
    parameters = Config(values, config.source, at=f"rope_parameters.{kind}.")
    if config.has("rope_parameters") and config.section("rope_parameters").values:
        parameters = config.section("rope_parameters").section(kind)
    return rope_from(config, parameters, head_dim, 10000.0)


def _feed_forward(config: Config, hidden: int, *, shares: bool) -> FeedForwardSpec | MoESpec:
    inner = config.integer("intermediate_size", 9216, high=MAX_WIDTH)
    if shares and config.flag("use_double_wide_mlp", False):
        inner *= 2
    if not config.flag("enable_moe_block", False):
        return FeedForwardSpec(inner, _activation(config))
    count = config.integer("num_experts", high=MAX_WIDTH)
    return MoESpec(
        experts=count,
        top_k=config.integer("top_k_experts", high=count),
        hidden=config.integer("moe_intermediate_size", high=MAX_WIDTH),
        activation=_activation(config),
        shared=inner,
        own_norms=True,
        router_scale=hidden**-0.5,
        expert_scale=True,
    )


def _activation(config: Config) -> Activation:
    return config.activation("hidden_activation", "gelu_pytorch_tanh")
