"""A GGUF file answers as the safetensors it was converted from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from localllm.checkpoint.opening import open_checkpoint
from localllm.errors import CheckpointError, UnsupportedModel
from localllm.models import load_spec, load_weights
from localllm.spec import DecoderSpec
from tests.checkpoint.files import random_blocks
from tests.models.gguf_writer import write_gguf
from tests.models.running import (
    TOLERANCE,
    backend,
    difference,
    golden,
    token_by_token,
    whole_prompt,
)
from tests.models.tiny import random_tensors

# Every case that metadata can express.
CASES = [
    "gemma2-softcaps",
    "gemma3-linear",
    "gemma3-pattern",
    "gpt2-tied",
    "gpt_oss-top2-yarn",
    "seed_oss-gqa",
    "seed_oss-no-bias-linear",
    "granite-bias-tied",
    "granite-mha-linear",
    "granite-multipliers",
    "llama-gqa",
    "llama-llama3-bias-head-dim",
    "llama-mha-tied",
    "llama-mqa-linear",
    "llama-yarn",
    "mistral-head-dim",
    "mistral-window",
    "mixtral-mha",
    "mixtral-top2",
    "mixtral-window-tied",
    "olmo2-gqa-tied",
    "olmo2-mha",
    "olmo2-mqa-bias-yarn",
    "phi3-longrope-long-tied",
    "phi3-longrope-short",
    "phi3-mha",
    "phi3-partial-window",
    "qwen2-gqa",
    "qwen2-yarn",
    "qwen3-head-dim",
    "qwen3_moe-norm-topk",
    "smollm3-nope",
    "starcoder2-tied",
    "starcoder2-window-untied",
    "exaone4-full-tied",
    "exaone4-layer-types-llama3",
    "exaone4-pattern",
    "gemma4-dense-keys-as-values",
    "gemma4-experts",
    "gemma4-multimodal",
    "gemma4-per-layer-shared",
    "glm4-gqa",
    "glm4-mqa-no-bias-tied",
    "glm4-rope-parameters",
    "glm4_moe-groups-two-shared",
    "glm4_moe-not-renormalized-yarn",
    "glm4_moe-one-dense",
    "lfm2-attention-first",
    "lfm2-layer-types",
    "lfm2_moe-one-dense",
    "ministral3-yarn-growth",
    "mistral3-ministral",
    "olmo3-layer-types-gqa",
    "olmo3-pattern-yarn",
    "olmo3-rope-parameters-tied",
    "qwen3_5-multimodal",
    "qwen3_5-one-key-head-tied-bias",
    "qwen3_5-pattern",
    "qwen3_5_moe-multimodal",
    "qwen3_5_moe-pattern",
    "qwen3_5_moe-top1-tied",
    "qwen3_next-grouped-heads",
]


@pytest.mark.parametrize("name", CASES)
def test_gguf_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    case = golden(name)
    running = backend(
        write_gguf(tmp_path / "model.gguf", case.config, case.tensors()), len(case.tokens)
    )
    assert difference(whole_prompt(running, case.tokens), case.whole) < TOLERANCE
    assert difference(token_by_token(running, case.tokens), case.stepwise) < TOLERANCE


def test_q_k_and_v_may_be_one_tensor_where_rows_are_reordered(tmp_path: Path) -> None:
    case = golden("llama-gqa")
    path = write_gguf(tmp_path / "model.gguf", case.config, case.tensors(), fuse_qkv=True)
    assert "blk.0.attn_qkv.weight" in open_checkpoint(path)
    running = backend(path, len(case.tokens))
    assert difference(whole_prompt(running, case.tokens), case.whole) < TOLERANCE


@pytest.mark.parametrize("name", ["glm4_moe-one-dense", "qwen3_5-pattern"])
def test_layers_that_guess_ahead_are_left_out(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = golden(name)
    layers = case.config["num_hidden_layers"]
    more = {f"blk.{layers}.nextn.eh_proj.weight": np.ones((32, 64), np.float32)}
    path = write_gguf(
        tmp_path / "model.gguf", case.config, case.tensors(), more=more,
        metadata={"block_count": layers + 1, "nextn_predict_layers": 1},
    )  # fmt: skip
    running = backend(path, len(case.tokens))
    assert difference(whole_prompt(running, case.tokens), case.whole) < TOLERANCE
    assert "nextn" in caplog.text


def test_qwen3_next_may_keep_all_of_a_key_head_together(tmp_path: Path) -> None:
    """As files from before the converter took them apart do."""
    case = golden("qwen3_next-grouped-heads")
    more, without = {}, []
    for name, data in case.tensors().items():
        if name.endswith("in_proj_qkvz.weight"):
            at = f"blk.{name.split('.')[2]}."
            more[f"{at}ssm_in.weight"] = data
            without += [f"{at}attn_qkv.weight", f"{at}attn_gate.weight"]
    path = write_gguf(
        tmp_path / "model.gguf", case.config, case.tensors(), more=more, without=tuple(without)
    )
    running = backend(path, len(case.tokens))
    assert difference(whole_prompt(running, case.tokens), case.whole) < TOLERANCE


def test_a_rate_that_no_exponential_gives_is_refused(tmp_path: Path) -> None:
    case = golden("qwen3_5-pattern")
    more = {"blk.0.ssm_a": np.array([-1.0, 0.5, -1.0, -1.0], np.float32)}
    path = write_gguf(tmp_path / "model.gguf", case.config, case.tensors(), more=more)
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ssm_a must be negative"):
        dict(load_weights(checkpoint, load_spec(checkpoint)))


def nvfp4_model(tmp_path: Path) -> tuple[Path, Path]:
    """A mixture in NVFP4 with the factors that its converter puts beside the blocks, for a matrix
    or for each expert; and the same in float32."""
    config = {
        **golden("qwen3_moe-norm-topk").config,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "moe_intermediate_size": 64,
        "num_experts": 3,
        "num_experts_per_tok": 2,
    }
    heads, kv, size = (
        config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    at = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (97, 64), "model.norm.weight": (64,),
        "lm_head.weight": (97, 64), f"{at}input_layernorm.weight": (64,),
        f"{at}post_attention_layernorm.weight": (64,), f"{at}mlp.gate.weight": (3, 64),
        f"{at}self_attn.q_proj.weight": (heads * size, 64),
        f"{at}self_attn.k_proj.weight": (kv * size, 64),
        f"{at}self_attn.v_proj.weight": (kv * size, 64),
        f"{at}self_attn.o_proj.weight": (64, heads * size),
        f"{at}self_attn.q_norm.weight": (size,), f"{at}self_attn.k_norm.weight": (size,),
        **{f"{at}mlp.experts.{e}.{m}_proj.weight": (64, 64)
           for e in range(3) for m in ("gate", "up", "down")},
    }  # fmt: skip
    tensors = random_tensors(shapes)
    plain = write_gguf(tmp_path / "plain.gguf", config, tensors)
    checkpoint = open_checkpoint(plain)
    packed: dict[str, Any] = {}
    whole: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(5)
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        if len(shape) < 2 or shape[-1] % 64 or "embd" in name or "gate_inp" in name:
            continue
        raw = random_blocks("NVFP4", math.prod(shape[:-1]), shape[-1] // 64)
        raw = (raw.reshape(-1, 36) & np.array([0x3F] * 4 + [0xFF] * 32, np.uint8)).reshape(
            raw.shape
        )
        factor = rng.uniform(0.05, 0.1, shape[:-2] or (1,)).astype(np.float32)
        stem = name.removesuffix(".weight")
        packed[name] = (raw.reshape(*shape[:-1], -1), gguf.GGMLQuantizationType.NVFP4)
        packed |= {f"{stem}.scale": factor, f"{stem}.input_scale": np.ones(1)}
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.NVFP4).reshape(shape)
        whole[name] = values * factor.reshape(-1, *(1,) * (len(shape) - 1))
    checkpoint.close()
    assert len(packed) == 3 * 8
    return (
        write_gguf(tmp_path / "nvfp4.gguf", config, tensors, more=packed),
        write_gguf(tmp_path / "whole.gguf", config, tensors, more=whole),
    )


def test_nvfp4_is_multiplied_with_the_factors_beside_it(tmp_path: Path) -> None:
    packed, whole = (backend(path, 24) for path in nvfp4_model(tmp_path))
    tokens = golden("qwen3_moe-norm-topk").tokens
    assert difference(whole_prompt(packed, tokens), whole_prompt(whole, tokens)) < 1e-6


def test_norms_hold_gemmas_one_in_gguf(tmp_path: Path) -> None:
    case = golden("gemma3-pattern")
    path = write_gguf(tmp_path / "model.gguf", case.config, case.tensors())
    spec = load_spec(open_checkpoint(path))
    layer = spec.layers[0]
    assert layer.mixer.qk_norm is not None
    assert (layer.norm.offset, layer.mixer.qk_norm.offset, spec.final_norm.offset) == (0, 0, 0)


@pytest.mark.parametrize(("name", "layers"), [("gemma2-softcaps", 46), ("gemma3-pattern", 62)])
def test_gemma_27b_scales_queries_by_hidden_over_heads(
    name: str, layers: int, tmp_path: Path
) -> None:
    spec = metadata_spec(tmp_path, name, num_hidden_layers=layers)
    assert spec.layers[0].mixer.scale == pytest.approx((32 / 4) ** -0.5)
    smaller = metadata_spec(tmp_path, name, num_hidden_layers=26)
    assert smaller.layers[0].mixer.scale == pytest.approx(16**-0.5)


def test_gemma_patterns_and_local_base_where_the_file_is_silent(tmp_path: Path) -> None:
    two = metadata_spec(tmp_path, "gemma2-softcaps", num_hidden_layers=4)
    assert [layer.mixer.window for layer in two.layers] == [5, None, 5, None]
    three = metadata_spec(
        tmp_path, "gemma3-linear", num_hidden_layers=7, sliding_window_pattern=None,
        rope_local_base_freq=None,
    )  # fmt: skip
    assert [layer.mixer.window for layer in three.layers] == [6, 6, 6, 6, 6, None, 6]
    local, full = three.layers[0].mixer.rope, three.layers[5].mixer.rope
    assert local is not None
    assert full is not None
    assert (local.theta, local.factor, full.theta, full.factor) == (10000.0, 1.0, 20000.0, 8.0)


def test_gemma3_without_a_window_sees_everything(tmp_path: Path) -> None:
    spec = metadata_spec(
        tmp_path, "gemma3-linear", sliding_window=None, sliding_window_pattern=None
    )
    assert [layer.mixer.window for layer in spec.layers] == [None] * 3


def test_sizes_may_be_listed_by_layer(tmp_path: Path) -> None:
    spec = metadata_spec(
        tmp_path, "llama-gqa", head_dim=8, num_key_value_heads=[2, 4], intermediate_size=[48, 32]
    )
    assert [layer.mixer.kv_heads for layer in spec.layers] == [2, 4]
    assert [getattr(layer.ffn, "hidden", 0) for layer in spec.layers] == [48, 32]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("attention.value_length", 12, "value_length"),
        ("attention.causal", False, "attention.causal"),
        ("attention.clamp_kqv", 8.0, "clamp_kqv"),
        ("expert_shared_count", 1, "expert_shared_count"),
        ("rope.scaling.type", "sideways", "sideways"),
        ("rope.dimension_sections", [1, 2, 3], "dimension_sections"),
    ],
)
def test_metadata_we_do_not_run_is_refused_by_its_key(
    key: str, value: object, named: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        metadata_spec(tmp_path, "llama-gqa", metadata={key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 100000),
        ("block_count", "two"),
        ("embedding_length", 0),
        ("attention.head_count", 0),
        ("attention.head_count", [4]),
        ("attention.head_count_kv", [2, 3]),
        ("attention.layer_norm_rms_epsilon", -1.0),
        ("rope.dimension_count", 7),
        ("rope.dimension_count", 100),
        ("rope.freq_base", float("nan")),
        ("rope.scaling.factor", -2.0),
        ("context_length", -1),
    ],
)
def test_senseless_metadata_is_refused_by_its_key(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        metadata_spec(tmp_path, "llama-gqa", metadata={key: value})
    assert key.split(".")[-1] in str(caught.value) or "partial_rotary" in str(caught.value)


def test_an_unknown_gguf_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    case = golden("llama-gqa")
    write_gguf(path, case.config, {}, architecture="rwkv7")
    with pytest.raises(UnsupportedModel, match="rwkv7"):
        load_spec(open_checkpoint(path))


@pytest.mark.parametrize("name", ["rope_factors_short.weight", "rope_factors_long.weight"])
def test_one_set_of_longrope_factors_is_not_enough(name: str, tmp_path: Path) -> None:
    case = golden("phi3-longrope-long-tied")
    path = write_gguf(tmp_path / "model.gguf", case.config, case.tensors(), without=(name,))
    with pytest.raises(CheckpointError, match=name):
        load_spec(open_checkpoint(path))


def test_a_missing_or_foreign_tensor_is_named(tmp_path: Path) -> None:
    case = golden("llama-gqa")
    path = write_gguf(
        tmp_path / "a.gguf", case.config, case.tensors(), without=("blk.1.ffn_up.weight",)
    )
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight"):
        load_weights(checkpoint, load_spec(checkpoint))
    path = write_gguf(tmp_path / "b.gguf", case.config, case.tensors(), metadata={"block_count": 1})
    checkpoint = open_checkpoint(path)
    with pytest.raises(UnsupportedModel, match=r"blk\.1\."):
        load_weights(checkpoint, load_spec(checkpoint))


def metadata_spec(
    folder: Path, name: str, *, metadata: dict[str, object] | None = None, **changes: object
) -> DecoderSpec:
    """The spec of a file that has metadata and an embedding, and no other tensors."""
    config = {key: value for key, value in golden(name).config.items() if key not in changes}
    config |= {key: value for key, value in changes.items() if value is not None}
    embed = {"model.embed_tokens.weight": np.ones((97, 32), np.float32)}
    path = write_gguf(folder / "model.gguf", config, embed, metadata=metadata or {})
    return load_spec(open_checkpoint(path))
