"""GGUF metadata of mixed and hybrid architectures, under the names of Hugging Face.

Sources: llama.cpp's conversion/{glm,gemma,lfm2,mistral3,qwen}.py and src/models/*.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from localllm.checkpoint.base import Checkpoint
from localllm.errors import CheckpointError
from localllm.models.config import MAX_LAYERS, MAX_VOCAB, MAX_WIDTH, Config

Values = dict[str, Any]


@dataclass(frozen=True)
class File:
    """meta: keys without the architecture in front. layers: without those that guess ahead.

    by_layer: sizes that are listed for each layer, of which `meta` has the first alone.
    layer_types: of windows, by the number of layers after which one sees everything.
    """

    checkpoint: Checkpoint
    meta: Config
    layers: int
    by_layer: Mapping[str, Sequence[int]]
    layer_types: Callable[[int], list[str]]

    def size(self, key: str, *default: int, low: int = 1) -> int:
        return self.meta.integer(key, *default, low=low, high=MAX_WIDTH)

    def has(self, ending: str) -> bool:
        """Whether a layer has such a tensor."""
        return any(f"blk.{n}.{ending}" in self.checkpoint for n in range(self.layers))


def ministral3(file: File, values: Values) -> Values:
    """Queries grow from the original context on, which YaRN brings along."""
    base = file.meta.number("rope.freq_base", 10000.0)
    scaling = values["rope_scaling"] or {"rope_type": "default"}
    growth = file.meta.number("attention.temperature_scale", 0.0, above=-1e-9)
    if growth and "original_max_position_embeddings" not in scaling:
        raise file.meta.bad("attention.temperature_scale", f"is {growth:g} without YaRN")
    found = {**scaling, "rope_theta": base, "llama_4_scaling_beta": growth}
    return {"rope_scaling": None, "rope_parameters": found}


def glm4_moe(file: File, values: Values) -> Values:
    # 0 stands for none.
    groups = file.size("expert_group_count", 1, low=0) or 1
    return {
        "n_routed_experts": file.size("expert_count"),
        "n_shared_experts": file.size("expert_shared_count"),
        "n_group": groups,
        "topk_group": file.size("expert_group_used_count", groups, low=0) or groups,
        "first_k_dense_replace": _dense(file),
        "norm_topk_prob": values.get("norm_topk_prob", False),
        "routed_scaling_factor": _weight_scale(file),
        "use_qk_norm": file.has("attn_q_norm.weight"),
    }


def lfm2(file: File, values: Values) -> Values:
    """Layers without keys are convolutions."""
    heads = file.by_layer.get("attention.head_count_kv", [1] * file.layers)
    return {
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "conv_L_cache": file.size("shortconv.l_cache"),
        "norm_eps": file.meta.number("attention.layer_norm_rms_epsilon", high=1.0),
        "block_auto_adjust_ff_dim": False,
    }


def lfm2_moe(file: File, values: Values) -> Values:
    return {
        **lfm2(file, values),
        "num_dense_layers": _dense(file),
        "use_expert_bias": file.has("exp_probs_b.bias") or file.has("exp_probs_b"),
        "norm_topk_prob": values.get("norm_topk_prob", True),
        "routed_scaling_factor": _weight_scale(file),
    }


def qwen3_5(file: File, values: Values) -> Values:
    value_heads = file.size("ssm.time_step_rank")
    inner = file.size("ssm.inner_size")
    if inner % value_heads:
        raise file.meta.bad("ssm.inner_size", f"is {inner} for {value_heads} heads")
    return {
        "linear_num_key_heads": file.size("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": file.size("ssm.state_size"),
        "linear_value_head_dim": inner // value_heads,
        "linear_conv_kernel_dim": file.size("ssm.conv_kernel"),
        "layer_types": _linear_layers(file),
    }


def qwen3_next(file: File, values: Values) -> Values:
    """Its experts' weights are always renormalized."""
    shared = file.size("expert_shared_feed_forward_length", 0, low=0)
    return {
        **qwen3_5(file, values),
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": shared or file.size("feed_forward_length"),
    }


def gemma4(file: File, values: Values) -> Values:
    kinds = file.layer_types(6)
    inner = file.by_layer.get("feed_forward_length", [])
    heads = file.by_layer.get("attention.head_count_kv")
    heads = heads or [file.size("attention.head_count_kv")] * file.layers
    own = dict(zip(kinds, heads, strict=True))
    wide, narrow = file.size("attention.key_length"), file.size("attention.key_length_swa")
    turning = file.size("rope.dimension_count_swa", narrow)
    full = {"rope_type": "proportional", "rope_theta": file.meta.number("rope.freq_base", 1e6)}
    local = {"rope_type": "default", "rope_theta": file.meta.number("rope.freq_base_swa", 1e4)}
    found = {
        "head_dim": narrow,
        "global_head_dim": wide,
        "num_key_value_heads": own.get("sliding_attention", heads[0]),
        "num_global_key_value_heads": own.get("full_attention", heads[0]),
        "attention_k_eq_v": any(
            f"blk.{n}.attn_k.weight" in file.checkpoint
            and f"blk.{n}.attn_v.weight" not in file.checkpoint
            for n in range(file.layers)
        ),
        "layer_types": kinds,
        "hidden_size_per_layer_input": file.size("embedding_length_per_layer_input", 0, low=0),
        "num_kv_shared_layers": file.meta.integer(
            "attention.shared_kv_layers", 0, low=0, high=MAX_LAYERS
        ),
        "final_logit_softcapping": values.get("final_logit_softcapping") or None,
        "use_double_wide_mlp": len(set(inner)) > 1,
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": {**full, "partial_rotary_factor": _turning_share(file, wide)},
            "sliding_attention": {**local, "partial_rotary_factor": min(1.0, turning / narrow)},
        },
    }
    if found["hidden_size_per_layer_input"]:
        name = "per_layer_token_embd.weight"
        if name not in file.checkpoint:
            raise CheckpointError(f"{file.meta.source}: {name} is missing")
        found["vocab_size_per_layer_input"] = min(file.checkpoint.shape(name)[0], MAX_VOCAB)
    if file.meta.values.get("expert_count"):
        found |= {
            "enable_moe_block": True,
            "num_experts": file.size("expert_count"),
            "top_k_experts": file.size("expert_used_count"),
        }
    return found


def _turning_share(file: File, head_dim: int) -> float:
    """Of the heads of layers that see everything: the rest's frequencies are divided by 1e30."""
    name = "rope_freqs.weight"
    if name not in file.checkpoint:
        return 1.0
    factors = file.checkpoint.tensor(name).to_float32()
    turning = int((factors == 1).sum())
    still = factors[turning:]
    if factors.shape != (head_dim // 2,) or np.any(factors[:turning] != 1) or np.any(still < 1e29):
        raise CheckpointError(
            f"{file.meta.source}: {name} must hold {head_dim // 2} factors, ones and then 1e30"
        )
    # Half an entry more, so that int(share * head_dim) is even and right whatever the rounding.
    return min(1.0, (2 * turning + 0.5) / head_dim)


def _linear_layers(file: File) -> list[str]:
    """As listed, or every `full_attention_interval`-th one attends."""
    key = "attention.recurrent_layers"
    if isinstance(file.meta.values.get(key), list | tuple):
        linear = [bool(entry) for entry in file.meta.items(key)][: file.layers]
        if len(linear) != file.layers:
            raise file.meta.bad(key, f"has {len(linear)} entries; {file.layers} are needed")
    else:
        period = file.meta.integer("full_attention_interval", 4, high=MAX_LAYERS)
        linear = [(n + 1) % period != 0 for n in range(file.layers)]
    return ["linear_attention" if one else "full_attention" for one in linear]


def _dense(file: File) -> int:
    return file.meta.integer("leading_dense_block_count", 0, low=0, high=MAX_LAYERS)


def _weight_scale(file: File) -> float:
    """0 stands for none."""
    return file.meta.number("expert_weights_scale", 0.0, above=-1e-9) or 1.0


FAMILIES: Mapping[str, Callable[[File, Values], Values]] = {
    "ministral3": ministral3,
    "glm4_moe": glm4_moe,
    "lfm2": lfm2,
    "lfm2_moe": lfm2_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_next,
    "qwen3_next": qwen3_next,
    "gemma4": gemma4,
}
