"""LFM2 MoE: LFM2 with mixtures of experts after the first layers, routed by sigmoid."""

from __future__ import annotations

from dataclasses import replace

from localllm.models import lfm2
from localllm.models.common import decoder, experts, feed_forward, sizes
from localllm.models.config import MAX_LAYERS, Config
from localllm.models.layout import Names, Part, Source
from localllm.spec import DecoderSpec, LayerSpec, MoESpec

_FFN = "layers.{n}.feed_forward."


def _expert(hub: str, part: Part | None, name: str) -> tuple[Source | str, ...]:
    """One matrix per expert as on the hub, then transformers' own fused form, then MLX's."""
    fused = Source(_FFN + f"experts.{name}", part=part, bare=True)
    own = "down_proj" if part is None else f"{part}_proj"
    return (f"{_FFN}experts.{{e}}.{hub}", fused, f"{_FFN}switch_mlp.{own}")


NAMES: Names = {
    **lfm2.NAMES,
    "moe.router": _FFN + "gate",
    "moe.selection_bias": Source(_FFN + "expert_bias", bare=True),
    "moe.gate": _expert("w1", "gate", "gate_up_proj"),
    "moe.up": _expert("w3", "up", "gate_up_proj"),
    "moe.down": _expert("w2", None, "down_proj"),
}


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), lfm2.rms_norm(config)
    dense = config.integer("num_dense_layers", 2, low=0, high=MAX_LAYERS)
    layers = [
        LayerSpec(mixer=mixer, ffn=feed_forward(config) if n < dense else _moe(config), norm=norm)
        for n, mixer in enumerate(lfm2.mixers(config, norm))
    ]
    return decoder("lfm2_moe", config, size, layers, norm, tied=lfm2.tied(config))


def _moe(config: Config) -> MoESpec:
    renormalize = config.flag("norm_topk_prob", True)
    return replace(
        experts(config, hidden_key="moe_intermediate_size", renormalize=renormalize),
        scores="sigmoid",
        selection_bias=config.flag("use_expert_bias", True),
        renormalize_eps=1e-6 if renormalize else 0.0,
        weight_scale=config.number("routed_scaling_factor", 1.0),
    )
