"""A `DecoderSpec` as the settings of the native engine."""

from __future__ import annotations

from localllm.errors import UnsupportedModel
from localllm.kernels_cpu import _native
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    GatedDeltaNetSpec,
    LayerSpec,
    MoESpec,
    NormSpec,
    RopeSpec,
)
from localllm.spec.memory import kv_groups


def ropes_of(spec: DecoderSpec) -> list[RopeSpec]:
    """The distinct RoPE kinds of a model, in order of first use."""
    return list(dict.fromkeys(a.rope for _, a in spec.attentions if a.rope is not None))


def model_config(spec: DecoderSpec, *, float_activations: bool) -> _native.ModelConfig:
    config = _native.ModelConfig()
    config.vocab = spec.vocab_size
    config.hidden = spec.hidden
    config.final_norm = _norm(spec.final_norm)
    config.tied_head = spec.tied_head
    config.embed_scale = spec.embed_scale
    config.learned_positions = spec.learned_positions or 0
    config.logit_scale = spec.logit_scale
    config.logit_softcap = spec.logit_softcap or 0.0
    config.float_activations = float_activations
    return config


def layer_configs(spec: DecoderSpec) -> list[_native.LayerConfig]:
    """Raises UnsupportedModel naming the layer and the part the native engine lacks."""
    ropes = ropes_of(spec)
    configs = [_layer(index, layer, ropes) for index, layer in enumerate(spec.layers)]
    for number, group in enumerate(kv_groups(spec)):
        for index in group.layers:
            configs[index].kv_group = number
    return configs


def _layer(index: int, layer: LayerSpec, ropes: list[RopeSpec]) -> _native.LayerConfig:
    config = _native.LayerConfig()
    if isinstance(layer.mixer, AttentionSpec):
        _attention(config, layer.mixer, ropes)
    elif isinstance(layer.mixer, GatedDeltaNetSpec):
        _delta_net(config, layer.mixer)
    else:
        config.mixer = _native.Mixer.short_conv
        config.kernel, config.channels = layer.mixer.kernel, layer.mixer.channels
    if isinstance(layer.ffn, MoESpec):
        config.experts = layer.ffn.experts
        config.top_k = layer.ffn.top_k
        config.renormalize = layer.ffn.renormalize
        config.renormalize_eps = layer.ffn.renormalize_eps
        config.sigmoid_scores = layer.ffn.scores == "sigmoid"
        config.selection_bias = layer.ffn.selection_bias
        config.groups = layer.ffn.groups
        config.top_groups = layer.ffn.top_groups
        config.weight_scale = layer.ffn.weight_scale
        config.shared = layer.ffn.shared
        config.shared_gate = layer.ffn.shared_gate
    elif isinstance(layer.ffn, FeedForwardSpec):
        config.gated = layer.ffn.gated
    else:
        raise UnsupportedModel(
            f"layer {index}: the cpu backend has no {type(layer.ffn).__name__} feed-forward"
        )
    config.hidden = layer.ffn.hidden
    config.activation = _native.Activation[layer.ffn.activation]
    config.pre_norm = _norm(layer.norm if layer.pre_norm else None)
    config.post_norm = _norm(layer.norm if layer.post_norm else None)
    config.residual_scale = layer.residual_scale
    return config


def _attention(config: _native.LayerConfig, attn: AttentionSpec, ropes: list[RopeSpec]) -> None:
    config.heads = attn.heads
    config.kv_heads = attn.kv_heads
    config.head_dim = attn.head_dim
    config.scale = attn.scale
    if attn.rope is not None:
        config.rope = ropes.index(attn.rope)
        config.rope_half = attn.rope.dim // 2
    config.window = attn.window or 0
    config.softcap = attn.softcap or 0.0
    config.qk_norm = _norm(attn.qk_norm)
    config.qk_norm_all = attn.qk_norm_over == "all"
    config.sinks = attn.sinks
    config.gate = attn.gate


def _delta_net(config: _native.LayerConfig, delta: GatedDeltaNetSpec) -> None:
    config.mixer = _native.Mixer.delta
    config.heads, config.head_dim = delta.value_heads, delta.value_dim
    config.kv_heads, config.key_dim = delta.key_heads, delta.key_dim
    config.kernel, config.channels = delta.kernel, delta.channels
    config.delta_eps = delta.eps


def _norm(norm: NormSpec | None) -> _native.NormConfig:
    config = _native.NormConfig()
    if norm is not None:
        config.present = True
        config.layer = norm.kind == "layer"
        config.eps = norm.eps
    return config
