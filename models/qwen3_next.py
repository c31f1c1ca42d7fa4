"""Qwen3-Next: the mixers of Qwen 3.5, and mixtures of experts with a shared one behind a gate."""

from __future__ import annotations

from dataclasses import replace

from localllm.models import qwen3_5, qwen3_moe
from localllm.models.common import decoder, experts, feed_forward, rms_norm, sizes
from localllm.models.config import MAX_LAYERS, MAX_WIDTH, Config
from localllm.models.layout import Names, Part, Source
from localllm.models.mtp import Mtp
from localllm.spec import DecoderSpec, LayerSpec
from localllm.spec.decoder import FeedForward

_DELTA = "layers.{n}.linear_attn."
_MLP = "layers.{n}.mlp."


def _fused(name: str, part: Part, own: str) -> tuple[Source | str, ...]:
    """Published by key heads in one matrix; transformers also knows them apart."""
    return (Source(_DELTA + name, part=part), _DELTA + own)


MOE_NAMES: Names = {
    **{stem: names for stem, names in qwen3_moe.NAMES.items() if stem.startswith("moe.")},
    "moe.shared.gate": _MLP + "shared_expert.gate_proj",
    "moe.shared.up": _MLP + "shared_expert.up_proj",
    "moe.shared.down": _MLP + "shared_expert.down_proj",
    "moe.shared_gate": _MLP + "shared_expert_gate",
}
NAMES: Names = {
    **qwen3_5.NAMES,
    **MOE_NAMES,
    "delta.qkv": _fused("in_proj_qkvz", "groups_qkv", "in_proj_qkv"),
    "delta.z": _fused("in_proj_qkvz", "groups_z", "in_proj_z"),
    "delta.beta": _fused("in_proj_ba", "groups_beta", "in_proj_b"),
    "delta.decay": _fused("in_proj_ba", "groups_decay", "in_proj_a"),
}


def mtp(spec: DecoderSpec) -> Mtp:
    return qwen3_5.mtp(spec, NAMES)


def spec(config: Config) -> DecoderSpec:
    return mixture("qwen3_next", config)


def mixture(name: str, config: Config) -> DecoderSpec:
    """Of the config of the language model."""
    size = sizes(config, handled=("shared_expert_intermediate_size",), head_dim=256)
    norm = rms_norm(config, offset=1.0)
    layers = [
        LayerSpec(mixer=mixer, ffn=_feed_forward(config, n), norm=norm)
        for n, mixer in enumerate(qwen3_5.mixers(config, norm))
    ]
    return decoder(name, config, size, layers, norm)


def _feed_forward(config: Config, layer: int) -> FeedForward:
    """Experts in every `decoder_sparse_step`-th layer, save those of `mlp_only_layers`."""
    dense = config.items("mlp_only_layers") if config.has("mlp_only_layers") else []
    step = config.integer("decoder_sparse_step", 1, high=MAX_LAYERS)
    if layer in dense or (layer + 1) % step:
        return feed_forward(config)
    renormalize = config.flag("norm_topk_prob", True)
    return replace(
        experts(config, hidden_key="moe_intermediate_size", renormalize=renormalize),
        shared=config.integer("shared_expert_intermediate_size", 512, high=MAX_WIDTH),
        shared_gate=True,
    )
