"""What llama.cpp's converters write for mixed and hybrid architectures: metadata, and tensors that
are not simply renamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gguf
import numpy as np

Config = Mapping[str, Any]
Tensors = Iterator[tuple[str, np.ndarray]]

_NOT_ATTENDING = ("linear_attention", "conv")


def text_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of a multimodal model the language model's, under the names it has alone."""
    others = ("vision_tower", "multi_modal_projector", "visual", "mtp.")
    found = {}
    for name, data in tensors.items():
        bare = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
        if not bare.startswith(others):
            found[bare if bare.startswith("lm_head") else f"model.{bare}"] = data
    return found


def write_metadata(writer: gguf.GGUFWriter, config: Config) -> dict[str, np.ndarray]:
    """Also the tensors that have no counterpart."""
    family = _METADATA.get(config["model_type"])
    return {} if family is None else family(writer, config) or {}


def _olmo3(writer: gguf.GGUFWriter, config: Config) -> None:
    kinds = config.get("layer_types")
    count = config["num_hidden_layers"]
    default = [(n + 1) % 4 != 0 for n in range(count)]
    slides = [kind == "sliding_attention" for kind in kinds] if kinds else default
    writer.add_sliding_window_pattern(slides)
    ropes = config.get("rope_parameters") or {}
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])


def _exaone4(writer: gguf.GGUFWriter, config: Config) -> None:
    if config.get("sliding_window") is not None:
        _olmo3(writer, config)


def _ministral3(writer: gguf.GGUFWriter, config: Config) -> None:
    rope = config["rope_parameters"]
    if rope.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _rope_share(writer: gguf.GGUFWriter, config: Config, default: float) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", default))
    writer.kv_data[0].pop(f"{writer.arch}.rope.dimension_count")
    writer.add_rope_dimension_count(int(config["head_dim"] * share))


def _glm4(writer: gguf.GGUFWriter, config: Config) -> None:
    _rope_share(writer, config, 0.5)


def _glm4_moe(writer: gguf.GGUFWriter, config: Config) -> None:
    _rope_share(writer, config, 0.5)
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config.get("n_shared_experts", 1))
    writer.add_leading_dense_block_count(config.get("first_k_dense_replace", 1))
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.get("routed_scaling_factor", 1.0))
    writer.kv_data[0].pop(f"{writer.arch}.expert_weights_norm", None)
    writer.add_expert_weights_norm(config.get("norm_topk_prob", True))
    writer.add_expert_group_count(config.get("n_group", 1))
    writer.add_expert_group_used_count(config.get("topk_group", 1))


def _attending(config: Config) -> list[bool]:
    return [kind not in _NOT_ATTENDING for kind in config["layer_types"]]


def _lfm2(writer: gguf.GGUFWriter, config: Config) -> None:
    heads = config["num_key_value_heads"]
    writer.kv_data[0].pop(f"{writer.arch}.attention.head_count_kv")
    writer.add_head_count_kv([heads if attends else 0 for attends in _attending(config)])
    writer.add_shortconv_l_cache(config.get("conv_L_cache", 3))
    if config.get("block_auto_adjust_ff_dim", True):
        step = config.get("block_multiple_of", 256)
        inner = int(2 * config["intermediate_size"] / 3)
        writer.kv_data[0].pop(f"{writer.arch}.feed_forward_length")
        writer.add_feed_forward_length(-(-inner // step) * step)


def _lfm2_moe(writer: gguf.GGUFWriter, config: Config) -> None:
    _lfm2(writer, {**config, "block_auto_adjust_ff_dim": False})
    writer.kv_data[0].pop(f"{writer.arch}.expert_weights_norm")  # llama.cpp always does
    writer.add_leading_dense_block_count(config.get("num_dense_layers", 2))
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _delta(writer: gguf.GGUFWriter, config: Config) -> None:
    _rope_share(writer, config, 0.25)
    heads = config["linear_num_value_heads"]
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * heads)
    if "layer_types" in config:
        listed = [not attends for attends in _attending(config)]
        writer.add_array(f"{writer.arch}.attention.recurrent_layers", listed)
    else:
        writer.add_full_attention_interval(config.get("full_attention_interval", 4))
    if config["model_type"].startswith("qwen3_5"):
        sections = config["rope_parameters"].get("mrope_section", [11, 11, 10])
        writer.add_rope_dimension_sections([*sections, 0][:4])
    if "shared_expert_intermediate_size" in config:
        writer.kv_data[0].pop(f"{writer.arch}.expert_weights_norm")
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _gemma4(writer: gguf.GGUFWriter, config: Config) -> dict[str, np.ndarray]:
    count, arch = config["num_hidden_layers"], writer.arch
    shared = config.get("num_kv_shared_layers", 0)
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    wide, narrow = config["global_head_dim"], config["head_dim"]
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count",
                "rope.freq_base"):  # fmt: skip
        writer.kv_data[0].pop(f"{arch}.{key}", None)
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_sliding_window_pattern(slides)
    writer.add_key_length(wide)
    writer.add_value_length(wide)
    writer.add_key_length_swa(narrow)
    writer.add_value_length_swa(narrow)
    writer.add_rope_dimension_count(wide)
    writer.add_rope_dimension_count_swa(narrow)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_freq_base_swa(1e4)
    if config.get("use_double_wide_mlp"):
        inner = config["intermediate_size"]
        writer.kv_data[0].pop(f"{arch}.feed_forward_length")
        writer.add_feed_forward_length([inner * (1 + (n >= count - shared)) for n in range(count)])
    if config.get("num_global_key_value_heads"):
        own, all_ = config["num_key_value_heads"], config["num_global_key_value_heads"]
        writer.kv_data[0].pop(f"{arch}.attention.head_count_kv")
        writer.add_head_count_kv([own if one else all_ for one in slides])
    if config.get("enable_moe_block"):
        writer.add_expert_used_count(config["top_k_experts"])
        writer.kv_data[0].pop(f"{arch}.expert_weights_norm")
    turning = int(wide * 0.25 / 2)
    return {"rope_freqs.weight": np.array([1.0] * turning + [1e30] * (wide // 2 - turning))}


_METADATA: Mapping[str, Callable[[gguf.GGUFWriter, Config], dict[str, np.ndarray] | None]] = {
    "olmo3": _olmo3,
    "exaone4": _exaone4,
    "ministral3": _ministral3,
    "glm4": _glm4,
    "glm4_moe": _glm4_moe,
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2_moe,
    "qwen3_5_text": _delta,
    "qwen3_5_moe_text": _delta,
    "qwen3_next": _delta,
    "gemma4_text": _gemma4,
}


def converted(config: Config, name: str, data: np.ndarray) -> Tensors | None:
    """Of a tensor that is more than renamed, its GGUF names and values; None for the others."""
    kind = config["model_type"]
    if kind.startswith("qwen3_") and kind != "qwen3_moe":
        return _of_qwen(config, name, data)
    if kind.startswith("lfm2") and name.endswith("conv.conv.weight"):
        return iter([(f"{_layer(name)}shortconv.conv.weight", data[:, 0])])
    if name.endswith((".expert_bias", ".e_score_correction_bias")):
        return iter([(f"{_layer(name)}exp_probs_b.bias", data)])
    if kind == "gemma4_text":
        return _of_gemma4(name, data)
    return None


def _layer(name: str) -> str:
    return f"blk.{name.split('.')[2]}."


def _of_gemma4(name: str, data: np.ndarray) -> Tensors | None:
    own = {
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "layer_scalar": "layer_output_scale.weight",
        "experts.gate_up_proj": "ffn_gate_up_exps.weight",
        "experts.down_proj": "ffn_down_exps.weight",
    }
    found = next((new for old, new in own.items() if name.endswith(old)), None)
    return None if found is None else iter([(_layer(name) + found, data)])


def _of_qwen(config: Config, name: str, data: np.ndarray) -> Tensors | None:
    part = name.split(".linear_attn.")[-1]
    if part == name:
        if name.endswith("norm.weight"):
            return _renamed(config, name, data + 1)
        if name.endswith("shared_expert_gate.weight"):
            return iter([(f"{_layer(name)}ffn_gate_inp_shexp.weight", data[0])])
        return None
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    at, qk = _layer(name), 2 * keys * key_dim
    tiles = config["model_type"].startswith("qwen3_5")

    def tiled(rows: np.ndarray, dim: int) -> np.ndarray:
        """From all value heads of a key head to one of each key head."""
        if not tiles:
            return rows
        grouped = rows.reshape(keys, values // keys, dim, *rows.shape[1:])
        return grouped.swapaxes(0, 1).reshape(rows.shape)

    if part == "in_proj_qkvz.weight":
        repeat = values // keys
        ends = np.cumsum([key_dim, key_dim, repeat * value_dim])
        groups = np.split(data.reshape(keys, -1, data.shape[-1]), ends, axis=1)
        q, k, v, z = (group.reshape(-1, data.shape[-1]) for group in groups)
        qkv = np.concatenate([q, k, v])
        return iter([(f"{at}attn_qkv.weight", qkv), (f"{at}attn_gate.weight", z)])
    if part == "in_proj_qkv.weight":
        qkv = np.concatenate([data[:qk], tiled(data[qk:], value_dim)])
        return iter([(f"{at}attn_qkv.weight", qkv)])
    if part == "conv1d.weight":
        taps = np.concatenate([data[:qk, 0], tiled(data[qk:, 0], value_dim)])
        return iter([(f"{at}ssm_conv1d.weight", taps)])
    simple = {
        "in_proj_z.weight": ("attn_gate.weight", lambda: tiled(data, value_dim)),
        "in_proj_b.weight": ("ssm_beta.weight", lambda: tiled(data, 1)),
        "in_proj_a.weight": ("ssm_alpha.weight", lambda: tiled(data, 1)),
        "in_proj_ba.weight": ("ssm_ba.weight", lambda: data),
        "A_log": ("ssm_a", lambda: -np.exp(tiled(data, 1))),
        "dt_bias": ("ssm_dt.bias", lambda: tiled(data, 1)),
        "norm.weight": ("ssm_norm.weight", lambda: data),
        "out_proj.weight": ("ssm_out.weight", lambda: tiled(data.T, value_dim).T),
    }
    new, values_of = simple[part]
    return iter([(at + new, values_of())])


def _renamed(config: Config, name: str, data: np.ndarray) -> Tensors:
    arch = {"qwen3_next": "qwen3next", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe"}
    named = arch[config["model_type"]]
    key = next(key for key, known in gguf.MODEL_ARCH_NAMES.items() if known == named)
    table = gguf.get_tensor_name_map(key, config["num_hidden_layers"])
    found = table.get_name(name, try_suffixes=(".weight",))
    assert found is not None, name
    yield found, data
