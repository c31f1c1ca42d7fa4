"""Configs become specs; what makes no sense or is not run is refused by name."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.checkpoint.opening import open_checkpoint
from localllm.errors import CheckpointError, LocalLLMError, UnsupportedModel
from localllm.models import known_architectures, load_spec
from localllm.models.config import Config
from localllm.models.registry import ARCHITECTURES
from localllm.spec import DecoderSpec
from tests.models.running import golden, golden_names

LLAMA: dict[str, Any] = golden("llama-gqa").config
ONE_OF_EACH = {golden(name).config["model_type"]: name for name in golden_names()}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def spec_of(config: dict[str, Any]) -> DecoderSpec:
    found = ARCHITECTURES[config["model_type"]]
    return found.spec(Config(config, Path("config.json")))


def llama(**changes: Any) -> DecoderSpec:
    return spec_of({**LLAMA, **changes})


def test_the_architectures_are_known() -> None:
    assert set(known_architectures()) == {
        "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3",
        "gemma3_text", "phi3", "smollm3", "olmo2", "olmo3", "granite", "starcoder2",
        "gpt2", "gpt_oss", "exaone4", "glm4", "glm4_moe", "seed_oss", "qwen3_5", "qwen3_5_text",
        "lfm2", "lfm2_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text",
        "gemma4", "gemma4_text", "ministral3", "mistral3",
    }  # fmt: skip


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    folder = golden("llama-gqa").write(tmp_path)
    (folder / "config.json").write_text(json.dumps({**LLAMA, "model_type": "mamba"}))
    with pytest.raises(UnsupportedModel, match="mamba") as caught:
        load_spec(open_checkpoint(folder))
    assert "llama" in str(caught.value.hint)


def test_a_config_without_model_type_is_an_error(tmp_path: Path) -> None:
    folder = golden("llama-gqa").write(tmp_path)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(CheckpointError, match="model_type"):
        load_spec(open_checkpoint(folder))


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "max_position_embeddings"],
)  # fmt: skip
def test_a_missing_size_is_named(key: str) -> None:
    config = {k: v for k, v in LLAMA.items() if k != key}
    with pytest.raises(CheckpointError, match=key):
        spec_of(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", True),
        ("hidden_size", 0),
        ("hidden_size", -32),
        ("hidden_size", 32.0),
        ("vocab_size", 10**9),
        ("num_hidden_layers", 1001),
        ("num_hidden_layers", 10**400),
        ("num_attention_heads", 6),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("head_dim", [8]),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", math.nan),
        ("rope_theta", math.inf),
        ("rope_theta", 10**400),
        ("rope_theta", -1.0),
        ("rope_theta", "10000"),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("hidden_act", 3),
        ("rope_scaling", "linear"),
        ("max_position_embeddings", None),
        ("partial_rotary_factor", 1.5),
        ("partial_rotary_factor", 0.1),
    ],
)
def test_a_senseless_value_is_refused_by_its_key(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=key):
        llama(**{key: value})


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"factor": 2.0}, "rope_type"),
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": -2.0}, "factor"),
        ({"type": "linear", "factor": None}, "factor"),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "original_max"),
        ({"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        ({"type": "llama3", **LLAMA3, "low_freq_factor": 4.0}, "high_freq_factor"),
        ({"type": "longrope", "short_factor": [1.0] * 4}, "long_factor"),
        ({"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 4}, "short_factor"),
        ({"type": "longrope", "short_factor": ["1"] * 4, "long_factor": [1.0] * 4}, "short_factor"),
    ],
)
def test_senseless_rope_scaling_is_refused_by_its_key(scaling: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        llama(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu2"}, "relu2"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "mrope"),
        ({"rope_parameters": {"rope_type": "axial"}}, "axial"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
    ],
)
def test_an_option_we_do_not_run_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        llama(**changes)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("qwen2-gqa", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("mistral-window", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma2-softcaps", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3-pattern", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping"),
        ("starcoder2-tied", {"norm_type": "rms_norm"}, "norm_type"),
        ("gpt2-tied", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2-tied", {"activation_function": "quick_gelu"}, "quick_gelu"),
    ],
)
def test_options_of_one_architecture_are_refused_by_name(
    name: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        spec_of({**golden(name).config, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("qwen2-gqa", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen3_moe-norm-topk", {"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ("qwen3_moe-norm-topk", {"num_experts": 0}, "num_experts"),
        ("qwen3_moe-norm-topk", {"mlp_only_layers": [2]}, "mlp_only_layers"),
        ("mixtral-top2", {"num_local_experts": None}, "num_experts"),
        ("mistral-window", {"sliding_window": 0}, "sliding_window"),
        ("smollm3-listed-untied", {"no_rope_layers": [0, 1]}, "no_rope_layers"),
        ("smollm3-listed-untied", {"no_rope_layers": [0, 1, 2]}, "no_rope_layers"),
        ("gpt2-tied", {"n_head": 3}, "n_head"),
        ("granite-multipliers", {"logits_scaling": 0.0}, "logits_scaling"),
        ("gemma3-multimodal", {"text_config": []}, "text_config"),
    ],
)
def test_values_of_one_architecture_are_checked(
    name: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        spec_of({**golden(name).config, **changes})


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_a_foreign_quantization_is_refused_by_name(method: str, tmp_path: Path) -> None:
    folder = golden("llama-gqa").write(tmp_path)
    config = {**LLAMA, "quantization_config": {"quant_method": method, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=method):
        load_spec(open_checkpoint(folder))


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope"])
def test_rope_scaling_and_rope_parameters_say_the_same(kind: str) -> None:
    scaling = {
        "linear": {"factor": 4.0},
        "llama3": LLAMA3,
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0},
        "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                     "original_max_position_embeddings": 16},
    }[kind]  # fmt: skip
    old = llama(rope_theta=777.0, rope_scaling={"type": kind, **scaling})
    new = llama(rope_parameters={"rope_type": kind, "rope_theta": 777.0, **scaling})
    assert old == new
    assert old.layers[0].mixer.rope is not None
    assert (old.layers[0].mixer.rope.kind, old.layers[0].mixer.rope.theta) == (kind, 777.0)


def test_phi3_calls_longrope_by_older_names() -> None:
    config = golden("phi3-longrope-long-tied").config
    for name in ("su", "yarn"):
        scaling = {**config["rope_scaling"], "type": name}
        assert spec_of({**config, "rope_scaling": scaling}) == spec_of(config)


def test_a_null_window_is_none_and_a_missing_one_is_mistrals_4096() -> None:
    config = golden("mistral-window").config
    missing = {key: value for key, value in config.items() if key != "sliding_window"}
    assert spec_of({**config, "sliding_window": None}).layers[0].mixer.window is None
    assert spec_of(missing).layers[0].mixer.window == 4096


def test_dynamic_rope_stretches_the_context_by_its_factor() -> None:
    spec = llama(max_position_embeddings=16, rope_scaling={"type": "dynamic", "factor": 3.0})
    assert spec.context == 48


def test_gemma3_4b_config_may_leave_out_what_transformers_assumes() -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    spec = spec_of({"model_type": "gemma3", "text_config": text})
    local, full = spec.layers[0].mixer, spec.layers[5].mixer
    assert (local.heads, local.kv_heads, local.head_dim, spec.vocab_size) == (8, 4, 256, 262208)
    assert (local.window, full.window, spec.context) == (1024, None, 131072)
    assert local.rope is not None
    assert full.rope is not None
    assert (local.rope.theta, local.rope.kind) == (10000.0, "default")
    assert (full.rope.theta, full.rope.kind, full.rope.factor) == (1000000.0, "linear", 8.0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@pytest.mark.parametrize("name", ONE_OF_EACH.values())
@given(data=st.data())
def test_no_config_causes_anything_but_our_errors(name: str, data: st.DataObject) -> None:
    config = dict(golden(name).config)
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        if key != "model_type":
            config[key] = data.draw(JSON)
    _survives(lambda: spec_of(config))


@given(scaling=st.dictionaries(st.sampled_from([
    "type", "rope_type", "factor", "rope_theta", "short_factor", "long_factor", "beta_fast",
    "original_max_position_embeddings", "attention_factor", "truncate", "low_freq_factor",
]), JSON | st.sampled_from(["linear", "yarn", "llama3", "longrope", "dynamic"])))  # fmt: skip
def test_no_rope_scaling_causes_anything_but_our_errors(scaling: dict[str, Any]) -> None:
    _survives(lambda: llama(rope_scaling=scaling))


def _survives(build: Callable[[], object]) -> None:
    with contextlib.suppress(LocalLLMError):
        build()
