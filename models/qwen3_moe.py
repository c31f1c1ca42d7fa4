"""Qwen 3 MoE: Qwen 3 with a mixture of experts in most or all layers."""

from __future__ import annotations

from localllm.models import qwen3
from localllm.models.common import (
    attention,
    decoder,
    experts,
    feed_forward,
    rms_norm,
    sizes,
    window,
)
from localllm.models.config import MAX_LAYERS, Config
from localllm.models.layout import Names, Source
from localllm.spec import DecoderSpec, LayerSpec
from localllm.spec.decoder import FeedForward

_MLP = "layers.{n}.mlp."

# One matrix per expert as on the hub, then transformers' own fused form, then MLX's.
NAMES: Names = {
    **qwen3.NAMES,
    "moe.router": _MLP + "gate",
    "moe.gate": (
        _MLP + "experts.{e}.gate_proj",
        Source(_MLP + "experts.gate_up_proj", part="gate", bare=True),
        _MLP + "switch_mlp.gate_proj",
    ),
    "moe.up": (
        _MLP + "experts.{e}.up_proj",
        Source(_MLP + "experts.gate_up_proj", part="up", bare=True),
        _MLP + "switch_mlp.up_proj",
    ),
    "moe.down": (
        _MLP + "experts.{e}.down_proj",
        Source(_MLP + "experts.down_proj", bare=True),
        _MLP + "switch_mlp.down_proj",
    ),
}


def spec(config: Config) -> DecoderSpec:
    size, norm = sizes(config), rms_norm(config)
    width = window(config, default=4096) if config.flag("use_sliding_window", False) else None
    mixer = attention(config, size, qk_norm=norm, window=width)
    layers = [
        LayerSpec(mixer=mixer, ffn=ffn, norm=norm) for ffn in _feed_forwards(config, size.layers)
    ]
    return decoder("qwen3_moe", config, size, layers, norm)


def _feed_forwards(config: Config, count: int) -> list[FeedForward]:
    """Experts in every `decoder_sparse_step`-th layer, save those of `mlp_only_layers`."""
    dense = config.items("mlp_only_layers") if config.has("mlp_only_layers") else []
    for layer in dense:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise config.bad("mlp_only_layers", f"names layer {layer!r} of {count}")
    step = config.integer("decoder_sparse_step", 1, high=MAX_LAYERS)
    sparse = [n not in dense and (n + 1) % step == 0 for n in range(count)]
    renormalize = config.flag("norm_topk_prob", False)

    def of(is_sparse: bool) -> FeedForward:
        if is_sparse:
            return experts(config, hidden_key="moe_intermediate_size", renormalize=renormalize)
        return feed_forward(config)

    return [of(is_sparse) for is_sparse in sparse]
