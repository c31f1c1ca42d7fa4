"""What a GGUF file says of mixtures and hybrids alone: the way back from `gguf_families.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from localllm.errors import UnsupportedModel
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    GatedDeltaNetSpec,
    MoESpec,
    ShortConvSpec,
)

Metadata = dict[str, Any]

_SIGMOID = 2


def family_metadata(spec: DecoderSpec) -> Metadata:
    """Keys without the architecture in front. Raises UnsupportedModel for what llama.cpp would run
    differently."""
    family = _FAMILIES.get(spec.architecture)
    return {} if family is None else family(spec)


def _qwen3_moe(spec: DecoderSpec) -> Metadata:
    moe = _mixture(spec)
    return {"expert_feed_forward_length": moe.hidden, "expert_weights_norm": moe.renormalize}


def _gpt_oss(spec: DecoderSpec) -> Metadata:
    if not all(attn.qkv_bias and attn.out_bias for _, attn in spec.attentions):
        raise UnsupportedModel("llama.cpp knows gpt-oss with biases of its attention alone")
    return {"expert_feed_forward_length": _mixture(spec).hidden}


def _ministral3(spec: DecoderSpec) -> Metadata:
    growth = spec.layers[0].attention.query_growth
    return {"attention.temperature_scale": growth} if growth else {}


def _glm4_moe(spec: DecoderSpec) -> Metadata:
    moe = _mixture(spec)
    return {
        **_sigmoid(spec, moe),
        "expert_shared_count": moe.shared // moe.hidden,
        "expert_weights_norm": moe.renormalize,
        "expert_group_count": moe.groups,
        "expert_group_used_count": moe.top_groups,
    }


def _lfm2(spec: DecoderSpec) -> Metadata:
    convolutions = [mixer for _, mixer in spec.recurrences if isinstance(mixer, ShortConvSpec)]
    return {"shortconv.l_cache": convolutions[0].kernel} if convolutions else {}


def _lfm2_moe(spec: DecoderSpec) -> Metadata:
    moe = _mixture(spec)
    if not (moe.selection_bias and moe.renormalize):
        raise UnsupportedModel(
            "llama.cpp knows LFM2's mixtures with a selection bias and renormalized weights alone"
        )
    return {**_lfm2(spec), **_sigmoid(spec, moe)}


def _sigmoid(spec: DecoderSpec, moe: MoESpec) -> Metadata:
    dense = [isinstance(layer.ffn, FeedForwardSpec) for layer in spec.layers]
    first = sum(dense)
    if not all(dense[:first]):
        raise UnsupportedModel(f"{spec.architecture} has dense layers after its mixtures")
    found: Metadata = {
        "expert_feed_forward_length": moe.hidden,
        "leading_dense_block_count": first,
        "expert_gating_func": _SIGMOID,
    }
    if moe.weight_scale != 1.0:
        found["expert_weights_scale"] = moe.weight_scale
    return found


def _qwen3_5(spec: DecoderSpec) -> Metadata:
    return {**_delta(spec), "rope.dimension_sections": _sections(spec)}


def _qwen3_5_moe(spec: DecoderSpec) -> Metadata:
    return {**_qwen3_next(spec), "rope.dimension_sections": _sections(spec)}


def _qwen3_next(spec: DecoderSpec) -> Metadata:
    moe = _mixture(spec)
    return {
        **_delta(spec),
        "expert_feed_forward_length": moe.hidden,
        "expert_shared_feed_forward_length": moe.shared,
    }


def _delta(spec: DecoderSpec) -> Metadata:
    linear = [not isinstance(layer.mixer, AttentionSpec) for layer in spec.layers]
    nets = {mixer for _, mixer in spec.recurrences if isinstance(mixer, GatedDeltaNetSpec)}
    if len(nets) != 1:
        raise UnsupportedModel(f"{spec.architecture} needs delta nets, all alike, in GGUF")
    net = nets.pop()
    if net.key_dim != net.value_dim:
        raise UnsupportedModel("llama.cpp knows delta nets whose keys are as long as values alone")
    found: Metadata = {
        "ssm.conv_kernel": net.kernel,
        "ssm.state_size": net.key_dim,
        "ssm.group_count": net.key_heads,
        "ssm.time_step_rank": net.value_heads,
        "ssm.inner_size": net.value_heads * net.value_dim,
    }
    period = linear.index(False) + 1
    if linear == [(n + 1) % period != 0 for n in range(len(linear))]:
        return {**found, "full_attention_interval": period}
    return {**found, "attention.recurrent_layers": linear}


def _sections(spec: DecoderSpec) -> list[int]:
    """How rotated pairs are shared among time, height and width; of text all three are alike."""
    rope = next(spec.attentions)[1].rope
    assert rope is not None
    half = rope.dim // 2
    first = -(-half // 3)
    second = -(-(half - first) // 2)
    return [first, second, half - first - second, 0]


def _gemma4(spec: DecoderSpec) -> Metadata:
    own = spec.per_layer
    if own is not None and own.vocab_size != spec.vocab_size:
        raise UnsupportedModel(
            f"per-layer embeddings of {own.vocab_size} tokens, beside {spec.vocab_size}, have no "
            "place in llama.cpp"
        )
    shared = [attn.shared_kv is not None for _, attn in spec.attentions]
    found: Metadata = {
        "embedding_length_per_layer_input": own.size if own is not None else 0,
        "attention.shared_kv_layers": sum(shared),
        "final_logit_softcapping": spec.logit_softcap or 0.0,  # of silent files llama.cpp takes 30
    }
    for _, attn in spec.attentions:
        if attn.window is not None and attn.rope is not None:
            found |= {
                "attention.key_length_swa": attn.head_dim,
                "attention.value_length_swa": attn.head_dim,
                "rope.dimension_count_swa": attn.rope.dim,
            }
            break
    else:
        raise UnsupportedModel("llama.cpp knows Gemma 4 with windows alone")
    if isinstance(spec.layers[0].ffn, MoESpec):
        found["expert_feed_forward_length"] = spec.layers[0].ffn.hidden
    return found


def _mixture(spec: DecoderSpec) -> MoESpec:
    found = next((layer.ffn for layer in spec.layers if isinstance(layer.ffn, MoESpec)), None)
    if found is None:
        raise UnsupportedModel(f"llama.cpp knows {spec.architecture} with experts alone")
    return found


_FAMILIES: Mapping[str, Callable[[DecoderSpec], Metadata]] = {
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "ministral3": _ministral3,
    "glm4_moe": _glm4_moe,
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2_moe,
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "gemma4": _gemma4,
}
