"""What is not computed, or does not fit, is refused by name; nothing is left out in silence."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localllm.adapters import load_adapter
from localllm.checkpoint.safetensors import write_safetensors
from localllm.checkpoint.tensor import Dense
from localllm.errors import CheckpointError, LocalLLMError, UnsupportedModel
from localllm.models.config import Config
from localllm.models.registry import ARCHITECTURES
from localllm.spec import DecoderSpec
from tests.adapters.tiny import write_adapter
from tests.examples import examples
from tests.models.running import golden

Tensors = dict[str, Dense]
PREFIX = "base_model.model.model.layers.0.self_attn."
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
}


def spec_of(name: str) -> DecoderSpec:
    config = golden(name).config
    return ARCHITECTURES[config["model_type"]].spec(Config(config, Path(name)))


LLAMA = spec_of("llama-gqa")  # hidden 32, 4 heads and 2 of keys, 2 layers


def matrix(*shape: int, value: float = 0.5) -> Dense:
    return Dense(np.full(shape, value, np.float32), "float32")


def good() -> Tensors:
    return {
        f"{PREFIX}q_proj.lora_A.weight": matrix(4, 32),
        f"{PREFIX}q_proj.lora_B.weight": matrix(32, 4),
        f"{PREFIX}v_proj.lora_A.weight": matrix(4, 32),
        f"{PREFIX}v_proj.lora_B.weight": matrix(16, 4),
    }


def pair(module: str, out: int = 32, inner: int = 32, rank: int = 4) -> Tensors:
    at = f"base_model.model.{module}"
    return {
        f"{at}.lora_A.weight": matrix(rank, inner),
        f"{at}.lora_B.weight": matrix(out, rank),
    }


def test_what_the_other_tests_spoil_is_good(tmp_path: Path):
    adapter = load_adapter(write_adapter(tmp_path / "mine", CONFIG, good()), LLAMA)
    assert adapter.name == "mine"
    assert set(adapter.targets) == {"layers.0.attn.q", "layers.0.attn.v"}
    assert {found.scale for found in adapter.targets.values()} == {2.0}
    assert adapter.nbytes == 4 * 4 * (32 + 32 + 32 + 16)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"use_something_new": True}, "use_something_new"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights.*base model"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"alpha_pattern": {"(a+)+": 3}}, "alpha_pattern.*forever"),
        ({"rank_pattern": {"(.*)(.*)(.*)q": 3}}, "rank_pattern.*forever"),
    ],
    ids=str,
)
def test_options_that_are_not_computed_are_refused_by_name(changes, named: str, tmp_path: Path):
    folder = write_adapter(tmp_path, {**CONFIG, **changes}, good())
    with pytest.raises(UnsupportedModel, match=named) as error:
        load_adapter(folder, LLAMA)
    assert error.value.hint or "peft_type" in named


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"r": None}, "r is missing"),
        ({"r": 0}, "r is 0"),
        ({"r": 8}, "rank of .*_proj is 4; .*says 8"),
        ({"rank_pattern": {"q_proj": 2}}, "rank of .*q_proj is 4; .*says 2"),
        ({"rank_pattern": {"q_proj": "2"}}, "q_proj must be a whole number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object"),
        ({"alpha_pattern": {"[": 2}}, "malformed pattern"),
        ({"lora_alpha": "many"}, "lora_alpha must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": 1e29}, "scale"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"target_modules": 3}, "target_modules"),
        ({"target_modules": ["q_proj"]}, "v_proj, which adapter_config.json does not name"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "no tensors for 'o_proj'"),
        ({"layers_to_transform": [1]}, "leaves out"),
        ({"layers_to_transform": "all"}, "layers_to_transform"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_itself_or_its_file_is_an_error(
    changes, named: str, tmp_path: Path
):
    folder = write_adapter(tmp_path, {**CONFIG, **changes}, good())
    with pytest.raises(CheckpointError, match=named):
        load_adapter(folder, LLAMA)


Q_A, Q_B = f"{PREFIX}q_proj.lora_A.weight", f"{PREFIX}q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("spoil", "error", "named"),
    [
        (lambda t: t.pop(Q_A), CheckpointError, r"q_proj\.lora_A\.weight is missing"),
        (lambda t: t.pop(Q_B), CheckpointError, r"q_proj\.lora_B\.weight is missing"),
        (lambda t: t.clear(), CheckpointError, "no tensors"),
        (lambda t: t.update({Q_A: matrix(4, 31)}), CheckpointError, r"\[4, 31\].*\[4, 32\]"),
        (lambda t: t.update({Q_B: matrix(16, 4)}), CheckpointError, r"\[16, 4\].*\[32, 4\]"),
        (lambda t: t.update({Q_B: matrix(32, 5)}), CheckpointError, r"\[32, 5\].*\[32, 4\]"),
        (lambda t: t.update({Q_A: matrix(4, 8, 4)}), CheckpointError, "rank of"),
        (lambda t: t.update({Q_A: matrix(4, 32, value=np.nan)}), CheckpointError, "NaN"),
        (lambda t: t.update({Q_B: matrix(32, 4, value=np.inf)}), CheckpointError, "infinite"),
        (
            lambda t: t.update({f"{PREFIX}q_proj.weight": matrix(32, 32)}),
            UnsupportedModel,
            r"q_proj\.weight is no matrix of LoRA",
        ),
        (
            lambda t: t.update({f"{PREFIX}q_proj.lora_magnitude_vector": matrix(32)}),
            CheckpointError,
            "DoRA",
        ),
        (
            lambda t: t.update({f"{PREFIX}q_proj.lora_B.bias": matrix(32)}),
            UnsupportedModel,
            "lora_bias",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": matrix(4)}),
            UnsupportedModel,
            "embedding",
        ),
        (lambda t: t.update(pair("lm_head", 97)), UnsupportedModel, "lm_head is the output head"),
        (
            lambda t: t.update(pair("model.embed_tokens")),
            UnsupportedModel,
            "embed_tokens is an embedding",
        ),
        (
            lambda t: t.update(pair("model.layers.0.self_attn.qkv_proj")),
            UnsupportedModel,
            "no linear model.layers.0.self_attn.qkv_proj",
        ),
        (
            lambda t: t.update(pair("model.layers.2.self_attn.q_proj")),
            CheckpointError,
            "layer 2 of a model with 2 layers",
        ),
        (
            lambda t: t.update(pair("layers.0.self_attn.q_proj")),
            CheckpointError,
            r"two modules adapt layers\.0\.attn\.q",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.lora_A.weight": matrix(4, 32),
                                "model.layers.1.self_attn.q_proj.lora_B.weight": matrix(32, 4)}),
            UnsupportedModel,
            "does not begin with 'base_model.model.'",
        ),
        (
            lambda t: t.update(pair("model.layers.1." + 300 * "x")),
            CheckpointError,
            "module name of 315 characters",
        ),
    ],
)  # fmt: skip
def test_tensors_that_are_missing_foreign_or_misshapen_are_named(
    spoil: Callable[[Tensors], object], error: type[LocalLLMError], named: str, tmp_path: Path
):
    tensors = good()
    spoil(tensors)
    config = {**CONFIG, "target_modules": "all-linear"}
    with pytest.raises(error, match=named):
        load_adapter(write_adapter(tmp_path, config, tensors), LLAMA)


def test_integers_are_no_weights(tmp_path: Path):
    folder = write_adapter(tmp_path, CONFIG, good())
    arrays: dict[str, Any] = {**good(), Q_A: np.ones((4, 32), np.int32)}
    write_safetensors(folder / "adapter_model.safetensors", arrays)
    with pytest.raises(UnsupportedModel, match="I32"):
        load_adapter(folder, LLAMA)


def test_a_list_may_name_modules_that_the_model_has_not(tmp_path: Path):
    config = {**CONFIG, "target_modules": ["q_proj", "v_proj", "fc1", "wqkv"]}
    found = load_adapter(write_adapter(tmp_path, config, good()), LLAMA)
    assert set(found.targets) == {"layers.0.attn.q", "layers.0.attn.v"}


def test_what_was_excluded_need_not_be_there(tmp_path: Path):
    targets = ["q_proj", "v_proj", "o_proj"]
    config = {**CONFIG, "target_modules": targets, "exclude_modules": ["o_proj"]}
    assert load_adapter(write_adapter(tmp_path, config, good()), LLAMA).targets


@pytest.mark.parametrize(
    ("model", "module"),
    [
        ("mixtral-top2", "model.layers.0.block_sparse_moe.experts.1.w1"),
        ("mixtral-top2", "model.layers.0.block_sparse_moe.gate"),
        ("qwen3_moe-norm-topk", "model.layers.0.mlp.experts.0.gate_proj"),
    ],
)
def test_experts_are_refused_with_the_reason(model: str, module: str, tmp_path: Path):
    config = {**CONFIG, "target_modules": "all-linear"}
    with pytest.raises(UnsupportedModel, match="is experts or their router") as error:
        load_adapter(write_adapter(tmp_path, config, pair(module)), spec_of(model))
    assert "Merge" in error.value.hint


QWEN3_MOE = "qwen3_moe-norm-topk"  # hidden 32, 6 experts of 20
OF_EXPERTS = {
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


def expert_pairs() -> Tensors:
    """Rank 4 each: down in the outer wrapper, gate and up in the inner one."""
    at = "model.layers.0.mlp.experts"
    return pair(at, 32, 20, 6 * 4) | pair(f"{at}.base_layer", 40, 32, 6 * 4)


def test_what_the_next_tests_spoil_is_good_too(tmp_path: Path):
    folder = write_adapter(tmp_path, {**CONFIG, **OF_EXPERTS}, expert_pairs())
    targets = load_adapter(folder, spec_of(QWEN3_MOE)).targets
    assert {name: (pair.a.shape, pair.b.shape) for name, pair in targets.items()} == {
        "layers.0.moe.gate": ((6, 4, 32), (6, 20, 4)),
        "layers.0.moe.up": ((6, 4, 32), (6, 20, 4)),
        "layers.0.moe.down": ((6, 4, 20), (6, 32, 4)),
    }


@pytest.mark.parametrize(
    ("changes", "tensors", "named"),
    [
        ({"r": 3}, {}, "has 8 experts; this model has 6"),
        ({"r": 5}, {}, "have 24 ranks together.*says 5 each"),
        ({"target_parameters": "down_proj"}, {}, "target_parameters.*must be a list"),
        ({}, pair("model.layers.0.mlp.experts.base_layer", 32, 40, 24), "lora_A.*shape.*calls for"),
        ({"target_parameters": ["experts.down_proj"]}, {}, "base_layer"),
        ({"target_modules": ["q_proj"]}, {}, "'q_proj'"),
        ({"use_dora": True}, {}, "lora_magnitude_vector is missing"),
    ],
    ids=str,
)
def test_pairs_of_experts_that_do_not_fit_are_named(changes, tensors, named, tmp_path: Path):
    config = {**CONFIG, **OF_EXPERTS, **changes}
    folder = write_adapter(tmp_path, config, expert_pairs() | tensors)
    with pytest.raises(LocalLLMError, match=named):
        load_adapter(folder, spec_of(QWEN3_MOE))


def test_square_experts_of_a_peft_that_took_them_for_their_transposes_are_refused(tmp_path: Path):
    spec = spec_of(QWEN3_MOE)
    square = replace(
        spec, layers=tuple(replace(at, ffn=replace(at.ffn, hidden=32)) for at in spec.layers)
    )
    tensors = pair("model.layers.0.mlp.experts", 32, 32, 24)
    only_down = {**CONFIG, **OF_EXPERTS, "target_parameters": ["experts.down_proj"]}
    for version in (None, "0.19.0", "0.21.1.dev0", "1.0"):
        config = {**only_down, "peft_version": version}
        load_adapter(write_adapter(tmp_path / "good", config, tensors), square)
    old = write_adapter(tmp_path / "old", {**only_down, "peft_version": "0.18.1"}, tensors)
    with pytest.raises(UnsupportedModel, match=r"before 0\.19.*down_proj for its transpose"):
        load_adapter(old, square)
    load_adapter(old, replace(square, architecture="gpt_oss"))


def test_experts_that_the_config_names_must_be_there(tmp_path: Path):
    only_down = pair("model.layers.0.mlp.experts", 32, 20, 24)
    config = {**CONFIG, **OF_EXPERTS, "target_parameters": ["experts.down_proj"]}
    load_adapter(write_adapter(tmp_path / "down", config, only_down), spec_of(QWEN3_MOE))
    config = {**CONFIG, **OF_EXPERTS}
    with pytest.raises(CheckpointError, match=r"no tensors for .experts\.gate_up_proj"):
        load_adapter(write_adapter(tmp_path / "both", config, only_down), spec_of(QWEN3_MOE))


def test_attention_beside_experts_can_be_adapted_but_no_dense_layer_that_is_not_there(
    tmp_path: Path,
):
    config = {**CONFIG, "target_modules": "all-linear"}
    spec = spec_of("mixtral-top2")
    found = load_adapter(write_adapter(tmp_path / "a", config, good()), spec)
    assert set(found.targets) == {"layers.0.attn.q", "layers.0.attn.v"}
    dense = pair("model.layers.0.mlp.gate_proj", 48)
    with pytest.raises(UnsupportedModel, match=r"no model\.layers\.0\.mlp\.gate_proj"):
        load_adapter(write_adapter(tmp_path / "b", config, dense), spec_of("qwen3_moe-norm-topk"))


class TestFolders:
    def test_pickles_are_never_opened_and_the_way_out_is_named(self, tmp_path: Path):
        (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
        (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
        with pytest.raises(CheckpointError, match="pickled weights are never loaded") as error:
            load_adapter(tmp_path, LLAMA)
        assert "safe_serialization" in error.value.hint

    def test_missing_files_are_named(self, tmp_path: Path):
        with pytest.raises(CheckpointError, match="is no folder"):
            load_adapter(tmp_path / "nowhere", LLAMA)
        with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
            load_adapter(tmp_path, LLAMA)
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"neither adapter_model\.safetensors nor"):
            load_adapter(tmp_path, LLAMA)

    def test_a_file_cut_short_is_told(self, tmp_path: Path):
        path = write_adapter(tmp_path, CONFIG, good()) / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(CheckpointError, match="but the file has only"):
            load_adapter(tmp_path, LLAMA)

    def test_what_is_loaded_does_not_change_with_its_file(self, tmp_path: Path):
        path = write_adapter(tmp_path, CONFIG, good()) / "adapter_model.safetensors"
        found = load_adapter(tmp_path, LLAMA)
        before = found.targets["layers.0.attn.q"].a.data.copy()
        content = bytearray(path.read_bytes())
        content[-64:] = bytes(64)
        path.write_bytes(content)
        assert np.array_equal(found.targets["layers.0.attn.q"].a.data, before)
        assert found.targets["layers.0.attn.q"].a.data.flags.owndata


class TestMlx:
    CONFIG: ClassVar[dict[str, Any]] = {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
    }
    AT = "model.layers.0.self_attn.q_proj"

    def load(self, folder: Path, tensors: Tensors | None = None, **changes: Any):
        tensors = tensors or {
            f"{self.AT}.lora_a": matrix(32, 4),
            f"{self.AT}.lora_b": matrix(4, 32),
        }
        config = {**self.CONFIG, **changes}
        return load_adapter(write_adapter(folder, config, tensors, "adapters.safetensors"), LLAMA)

    def test_a_plain_one_is_read(self, tmp_path: Path):
        assert self.load(tmp_path).targets["layers.0.attn.q"].scale == 20.0

    @pytest.mark.parametrize(
        ("changes", "error", "named"),
        [
            ({"fine_tune_type": "dora"}, CheckpointError, r"q_proj\.m is missing"),
            ({"fine_tune_type": "full"}, UnsupportedModel, "fine_tune_type"),
            ({"num_layers": 1}, CheckpointError, "leaves out"),
            ({"lora_parameters": {"rank": 8, "scale": 1.0}}, CheckpointError, "is 4; .*says 8"),
            ({"lora_parameters": {"rank": 4}}, CheckpointError, r"lora_parameters\.scale"),
            ({"lora_parameters": None}, CheckpointError, "lora_parameters is missing"),
            (
                {"lora_parameters": {"rank": 4, "scale": 1.0, "keys": ["mlp.up_proj"]}},
                CheckpointError,
                "does not name",
            ),
        ],
        ids=str,
    )
    def test_what_does_not_fit_is_named(self, changes, error, named: str, tmp_path: Path):
        with pytest.raises(error, match=named):
            self.load(tmp_path, **changes)

    def test_unnamed_dora_and_experts_are_refused(self, tmp_path: Path):
        tensors = {
            f"{self.AT}.lora_a": matrix(32, 4),
            f"{self.AT}.lora_b": matrix(4, 32),
            f"{self.AT}.m": matrix(32),
        }
        with pytest.raises(CheckpointError, match="DoRA"):
            self.load(tmp_path, tensors)
        with pytest.raises(UnsupportedModel, match=r"DoRA.*not at hand"):
            self.load(tmp_path, tensors, fine_tune_type="dora")
        stacked = {f"{self.AT}.lora_a": matrix(2, 4, 32), f"{self.AT}.lora_b": matrix(2, 32, 4)}
        with pytest.raises(CheckpointError, match="no matrix"):
            self.load(tmp_path, stacked)


@settings(
    deadline=None,
    max_examples=examples(60),
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.dictionaries(
        st.sampled_from([*CONFIG, "rank_pattern", "alpha_pattern", "layers_to_transform", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
            max_leaves=4,
        ),
        max_size=4,
    )
)
def test_any_config_is_read_or_refused_with_an_error_of_ours(tmp_path: Path, changes):
    folder = write_adapter(tmp_path, {**CONFIG, **changes}, good())
    with suppress(LocalLLMError):
        load_adapter(folder, LLAMA)


def test_a_hostile_pattern_takes_no_time(tmp_path: Path):
    many = {f"x{n}.*y.*z": 4 for n in range(2000)}
    start = time.perf_counter()
    load_adapter(write_adapter(tmp_path, {**CONFIG, "rank_pattern": many}, good()), LLAMA)
    assert time.perf_counter() - start < 5
