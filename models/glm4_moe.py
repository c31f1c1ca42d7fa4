"""GLM 4.5 to 4.7: sigmoid routing, a bias that only chooses, shared experts, dense early layers.

The checkpoints' last layer, which predicts one token more (MTP), may serve as a draft head.
"""

from __future__ import annotations

from localllm.models import qwen3_moe
from localllm.models.common import attention, decoder, feed_forward, rms_norm, sizes
from localllm.models.config import MAX_LAYERS, MAX_WIDTH, Config
from localllm.models.layout import PREFIXES, Names, Source
from localllm.models.mtp import Mtp, names_of_layer
from localllm.models.rope import rope
from localllm.spec import DecoderSpec, LayerSpec, MoESpec

_MLP = "layers.{n}.mlp."

NAMES: Names = {
    **qwen3_moe.NAMES,
    "moe.selection_bias": Source(_MLP + "gate.e_score_correction_bias", bare=True),
    "moe.shared.gate": _MLP + "shared_experts.gate_proj",
    "moe.shared.up": _MLP + "shared_experts.up_proj",
    "moe.shared.down": _MLP + "shared_experts.down_proj",
}
OTHER_PARTS = ("model.layers.{past}.*",)


def mtp(spec: DecoderSpec) -> Mtp:
    past = len(spec.layers)
    at = f"layers.{past}."
    return Mtp(
        layer=spec.layers[-1],
        names=names_of_layer(NAMES, past, final_norm=f"{at}shared_head.norm"),
        prefixes=PREFIXES,
        hidden_norm=f"{at}hnorm",
        embedding_norm=f"{at}enorm",
        fuse=f"{at}eh_proj",
    )


def spec(config: Config) -> DecoderSpec:
    size = sizes(config, handled=("n_shared_experts", "use_qk_norm"))
    norm = rms_norm(config, default=1e-5)
    mixer = attention(
        config,
        size,
        rope=rope(config, size.head_dim, share=0.5),
        out_bias=False,
        qk_norm=norm if config.flag("use_qk_norm", False) else None,
    )
    dense = config.integer("first_k_dense_replace", 1, low=0, high=MAX_LAYERS)
    layers = [
        LayerSpec(mixer, feed_forward(config) if n < dense else _experts(config), norm)
        for n in range(size.layers)
    ]
    return decoder("glm4_moe", config, size, layers, norm)


def _experts(config: Config) -> MoESpec:
    count = config.integer("n_routed_experts", 128, high=MAX_WIDTH)
    groups = config.integer("n_group", 1, high=count)
    hidden = config.integer("moe_intermediate_size", 1408, high=MAX_WIDTH)
    if count % groups or (groups > 1 and count < 2 * groups):
        raise config.bad("n_group", f"is {groups}, for {count} experts")
    top_groups = config.integer("topk_group", 1, high=groups)
    return MoESpec(
        experts=count,
        top_k=config.integer("num_experts_per_tok", 8, high=count // groups * top_groups),
        hidden=hidden,
        activation=config.activation("hidden_act", "silu"),
        renormalize=config.flag("norm_topk_prob", True),
        scores="sigmoid",
        selection_bias=True,
        groups=groups,
        top_groups=top_groups,
        renormalize_eps=1e-20,
        weight_scale=config.number("routed_scaling_factor", 1.0),
        shared=hidden * config.integer("n_shared_experts", 1, high=MAX_WIDTH),
    )
