"""Writes a tiny Hugging Face checkpoint as GGUF, the way llama.cpp's converters do.

Tensor names come from the gguf package's own table; what converters do to values (rows of q and k
reordered, Gemma's norms made whole, experts merged, GPT-2 turned around) is done here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.models.gguf_families import converted, text_tensors, write_metadata

_WIDE_EPS = (
    "mixtral", "phi3", "olmo2", "olmo3", "exaone4", "gpt_oss", "ministral3", "glm4_moe", "lfm2",
    "lfm2_moe",
)  # fmt: skip
# model type -> architecture in GGUF
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "granite": "granite",
    "starcoder2": "starcoder2",
    "gpt2": "gpt2",
    "gpt_oss": "gpt-oss",
    "seed_oss": "seed_oss",
    "olmo3": "olmo2",
    "exaone4": "exaone4",
    "ministral3": "mistral3",
    "glm4": "glm4",
    "glm4_moe": "glm4moe",
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "gemma4_text": "gemma4",
}
_REORDERED = ("llama", "mistral", "mixtral", "smollm3", "granite", "ministral3")
_EXPERTS = {"w1": "ffn_gate", "gate_proj": "ffn_gate", "w3": "ffn_up", "up_proj": "ffn_up"}


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    metadata: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    more: Mapping[str, Any] | None = None,
    fuse_qkv: bool = False,
    architecture: str | None = None,
) -> Path:
    """metadata: keys, without the architecture in front, that replace or follow the usual ones.

    without, more: tensors to leave out, by their GGUF names, and to add or replace; blocks come
    with their type.
    """
    if "text_config" in config:
        config, tensors = config["text_config"], text_tensors(tensors)
    writer = gguf.GGUFWriter(path, architecture or ARCHITECTURES[config["model_type"]])
    _write_sizes(writer, config)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    extra = _write_rope(writer, config, rope) if config["model_type"] != "gpt2" else {}
    extra |= write_metadata(writer, config)
    for key, value in (metadata or {}).items():
        _replace(writer, f"{writer.arch}.{key}", value)
    converted = {**dict(_converted(config, tensors)), **extra, **(more or {})}
    for name, data in (_fused(converted) if fuse_qkv else converted).items():
        if name in without:
            continue
        if isinstance(data, tuple):
            writer.add_tensor(name, data[0], raw_dtype=data[1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _replace(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    writer.kv_data[0].pop(key, None)
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    kinds = {bool: writer.add_bool, int: writer.add_int32, float: writer.add_float32}
    kinds.get(type(value), writer.add_string)(key, value)


def _fused(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """q, k and v of each layer as one tensor."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith(".attn_q.weight"):
            parts = [found.pop(name.replace("attn_q", f"attn_{part}")) for part in "qkv"]
            found[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    return found


def _write_sizes(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    kind, get = config["model_type"], config.get
    hidden = get("hidden_size") or get("n_embd")
    heads = get("num_attention_heads") or get("n_head")
    writer.add_block_count(get("num_hidden_layers") or get("n_layer"))
    writer.add_embedding_length(hidden)
    writer.add_context_length(get("max_position_embeddings") or get("n_positions"))
    writer.add_feed_forward_length(get("intermediate_size") or 4 * hidden)
    writer.add_head_count(heads)
    if kind == "gpt2":
        writer.add_layer_norm_eps(get("layer_norm_epsilon", 1e-5))
        return
    writer.add_head_count_kv(get("num_key_value_heads") or heads)
    if kind == "starcoder2":
        writer.add_layer_norm_eps(get("norm_epsilon", 1e-5))
    else:
        default = 1e-5 if kind in _WIDE_EPS else 1e-6
        writer.add_layer_norm_rms_eps(get("rms_norm_eps", get("norm_eps", default)))
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    experts = get("num_local_experts") or get("num_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(get("num_experts_per_tok") or config["top_k_experts"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_weights_norm(get("norm_topk_prob", False))
    if get("sliding_window_pattern"):
        writer.add_sliding_window_pattern(config["sliding_window_pattern"])
    if get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if kind == "granite":
        writer.add_attention_scale(get("attention_multiplier", 1.0))
        writer.add_embedding_scale(get("embedding_multiplier", 1.0))
        writer.add_residual_scale(get("residual_multiplier", 1.0))
        writer.add_logit_scale(get("logits_scaling", 1.0))


def _write_rope(
    writer: gguf.GGUFWriter, config: Mapping[str, Any], rope: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The metadata, and the tensors of factors that some kinds have."""
    base = {"mixtral": 1e6, "gpt_oss": 150000.0, "smollm3": 2e6, "gemma3_text": 1e6,
            "olmo3": 5e5, "lfm2": 1e6, "lfm2_moe": 1e6}.get(config["model_type"], 1e4)  # fmt: skip
    base = rope.get("rope_theta", config.get("rope_theta", base))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotated = int(head_dim * config.get("partial_rotary_factor", 1.0))
    writer.add_rope_freq_base(base)
    writer.add_rope_dimension_count(rotated)
    if "rope_local_base_freq" in config:
        writer.add_rope_freq_base_swa(config["rope_local_base_freq"])
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attention_factor" in rope:  # llama.cpp multiplies it with YaRN's own
            own = 0.1 * math.log(rope["factor"]) + 1
            writer.add_rope_scaling_attn_factors(rope["attention_factor"] / own)
    elif kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, base, rotated)}
    elif kind == "longrope":
        original = config["original_max_position_embeddings"]
        stretch = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretch) / math.log(original)))
        return {
            "rope_factors_long.weight": np.array(rope["long_factor"]),
            "rope_factors_short.weight": np.array(rope["short_factor"]),
        }
    return {}


def _llama3_factors(rope: Mapping[str, Any], base: float, dim: int) -> np.ndarray:
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * base ** (-np.arange(0, dim, 2) / dim)
    turns /= 2 * math.pi  # within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _converted(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    kind = config["model_type"]
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[kind])
    layers = config.get("num_hidden_layers") or config["n_layer"]
    table = gguf.get_tensor_name_map(arch, layers)
    merged: dict[str, list[np.ndarray]] = {}
    for name, data in tensors.items():
        if kind == "gpt_oss" and (".experts." in name or name.endswith(".sinks")):
            yield from _of_gpt_oss(name, data)
            continue
        own = converted(config, name, data)
        if own is not None:
            yield from own
            continue
        if ".experts." in name:
            merged.setdefault(_merged_name(name), []).append(data)
            continue
        data = _as_converters_store(config, name, data)
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"the gguf package knows no {name}"
        yield found, data
    for name, matrices in merged.items():
        yield name, np.stack(matrices)


def _of_gpt_oss(name: str, data: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Gate and up, whose columns take turns, apart; matrices with the inputs last."""
    at, part = f"blk.{name.split('.')[2]}.", name.rsplit(".", 1)[-1]
    if part == "sinks":
        yield f"{at}attn_sinks.weight", data
        return
    suffix = ".bias" if part.endswith("_bias") else ".weight"
    if suffix == ".weight":
        data = data.swapaxes(1, 2)  # [E, out, in]
    if part.startswith("down"):
        yield f"{at}ffn_down_exps{suffix}", data
        return
    yield f"{at}ffn_gate_exps{suffix}", data[:, 0::2]
    yield f"{at}ffn_up_exps{suffix}", data[:, 1::2]


def _merged_name(name: str) -> str:
    layer, matrix = name.split(".")[2], name.split(".")[-2]
    return f"blk.{layer}.{_EXPERTS.get(matrix, 'ffn_down')}_exps.weight"


def _as_converters_store(config: Mapping[str, Any], name: str, data: np.ndarray) -> np.ndarray:
    kind = config["model_type"]
    if kind in _REORDERED and ".q_proj." in name:
        return _reordered(data, config["num_attention_heads"])
    if kind in _REORDERED and ".k_proj." in name:
        kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        return _reordered(data, kv_heads)
    if kind in ("gemma2", "gemma3_text") and name.endswith("norm.weight"):
        return data + 1
    if kind == "gpt2" and data.ndim == 2 and ("c_" in name):
        return data.T
    return data


def _reordered(data: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (0 … d/2, d/2 …) to (0, d/2, 1, d/2 + 1, …)."""
    halves = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
    return halves.swapaxes(1, 2).reshape(data.shape)
