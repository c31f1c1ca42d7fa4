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
from localllm.spec.memory import kv_groups, kv_layer


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
    if spec.per_layer is not None:
        config.per_layer = spec.per_layer.size
        config.per_layer_vocab = spec.per_layer.vocab_size
        config.per_layer_activation = _native.Activation[spec.per_layer.activation]
    return config


def layer_configs(spec: DecoderSpec) -> list[_native.LayerConfig]:
    """Raises UnsupportedModel naming the layer and the part the native engine lacks."""
    ropes = ropes_of(spec)
    configs = [_layer(index, layer, ropes) for index, layer in enumerate(spec.layers)]
    for number, group in enumerate(kv_groups(spec)):
        for index in group.layers:
            configs[index].kv_group = number
    for index, _ in spec.attentions:
        _check_order(spec, index)
        configs[index].kv_group = configs[kv_layer(spec, index)].kv_group
    return configs


def _check_order(spec: DecoderSpec, index: int) -> None:
    """Entries of heads that rotate neighbours are kept in another order, in q and k alike."""
    attn = spec.layers[index].attention
    owner = spec.layers[kv_layer(spec, index)].attention
    orders = {rope.dim if rope and rope.interleaved else 0 for rope in (attn.rope, owner.rope)}
    if len(orders) > 1:
        problem = "rotates other pairs than the layer whose keys it shares"
    elif attn.v_from_k and orders != {0}:
        problem = "rotates neighbouring entries of keys that are also values"
    else:
        return
    raise UnsupportedModel(
        f"layer {index} {problem}, which the cpu backend cannot",
        hint="run it on the reference backend: --backend reference",
    )


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
        config.own_norms = layer.ffn.own_norms
        config.router_scale = layer.ffn.router_scale
        config.expert_scale = layer.ffn.expert_scale
    elif isinstance(layer.ffn, FeedForwardSpec):
        config.gated = layer.ffn.gated
    else:
        raise UnsupportedModel(
            f"layer {index}: the cpu backend has no {type(layer.ffn).__name__} feed-forward"
        )
    config.hidden = layer.ffn.hidden
    config.activation = _native.Activation[layer.ffn.activation]
    config.norm = _norm(layer.norm)
    config.pre_norm = _norm(layer.norm if layer.pre_norm else None)
    config.post_norm = _norm(layer.norm if layer.post_norm else None)
    config.scalar = layer.scalar
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
    if attn.v_norm is not None:
        config.v_norm = _norm(NormSpec(eps=attn.v_norm))
    config.v_from_k = attn.v_from_k
    config.kv_source = -1 if attn.shared_kv is None else attn.shared_kv
    config.query_growth = attn.query_growth
    config.query_context = attn.query_context
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
