"""Writes tests/models/golden: what transformers computes for tiny models of every architecture.

Each case is a config as the hub has it. transformers builds the model and saves it once, which
gives the tensor names; the weights are then drawn by tests/models/tiny.py and read back by
transformers' own loader, so that names, shapes and config keys are all its own.

    python scripts/goldens/models.py [case …]
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # instead of this folder, whose modules hide libraries by their names
    sys.path[0] = str(ROOT)

from tests.models.tiny import random_tensors, random_tokens, write_checkpoint  # noqa: E402

GOLDEN = ROOT / "tests/models/golden"
TOKENS = 24
_BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "model_type": "siglip_vision_model",
}
_EPS = 0.02  # large enough to show in the logits
_SHORT = [1.0, 1.05, 1.1, 1.3]
_LONG = [1.2, 2.0, 3.5, 5.0]
_SLIDE, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
_SQUARE = {**_DELTA, "linear_num_value_heads": 6, "linear_value_head_dim": 8}
_SHARED = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
}
_MROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "mrope_interleaved": True,
    "mrope_section": [1, 1, 0],
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}


def _case(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_BASE, **changes}


def _longrope(original: int, **more: Any) -> dict[str, Any]:
    return {
        "original_max_position_embeddings": original,
        "rope_scaling": {"type": "longrope", "short_factor": _SHORT, "long_factor": _LONG},
        **more,
    }


_PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}


def _gemma4(**changes: Any) -> dict[str, Any]:
    own = {"head_dim": 12, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
    return _case("gemma4_text", **{**own, **changes})


CASES: dict[str, dict[str, Any]] = {
    "llama-gqa": _case("llama", rms_norm_eps=_EPS),
    "llama-mha-tied": _case("llama", num_key_value_heads=None, tie_word_embeddings=True),
    "llama-mqa-linear": _case(
        "llama",
        num_key_value_heads=1,
        vocab_size=101,
        rope_theta=500.0,
        rope_scaling={"type": "linear", "factor": 4.0},
    ),
    "llama-llama3-bias-head-dim": _case(
        "llama",
        head_dim=12,
        attention_bias=True,
        mlp_bias=True,
        rope_theta=500000.0,
        rope_scaling=_LLAMA3,
    ),
    "llama-dynamic": _case(
        "llama", max_position_embeddings=16, rope_scaling={"type": "dynamic", "factor": 3.0}
    ),
    "llama-yarn": _case("llama", head_dim=16, rope_parameters={**_YARN, "rope_theta": 10000.0}),
    "mistral-window": _case("mistral", sliding_window=7, num_key_value_heads=1),
    "mistral-head-dim": _case("mistral", rms_norm_eps=_EPS, head_dim=20, sliding_window=None),
    "mistral-yarn": _case(
        "mistral",
        sliding_window=None,
        head_dim=16,
        rope_parameters={
            **_YARN,
            "rope_theta": 1000.0,
            "beta_fast": 4.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.3,
            "truncate": False,
        },
    ),
    "mixtral-top2": _case("mixtral", rms_norm_eps=_EPS, num_local_experts=4, num_experts_per_tok=2),
    "mixtral-window-tied": _case(
        "mixtral",
        num_local_experts=3,
        num_experts_per_tok=1,
        num_key_value_heads=1,
        sliding_window=5,
        head_dim=12,
        tie_word_embeddings=True,
        rope_theta=100.0,
    ),
    "mixtral-mha": _case(
        "mixtral", num_local_experts=5, num_experts_per_tok=3, num_key_value_heads=4
    ),
    "qwen2-gqa": _case("qwen2", rms_norm_eps=_EPS, rope_theta=1000000.0),
    "qwen2-upper-windows-tied": _case(
        "qwen2",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen2-layer-types": _case(
        "qwen2",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=[_SLIDE, _FULL, _SLIDE],
        num_key_value_heads=1,
    ),
    "qwen2-yarn": _case("qwen2", rope_scaling={**_YARN, "attention_factor": 1.3}),
    "qwen3-head-dim": _case("qwen3", rms_norm_eps=_EPS, head_dim=16),
    "qwen3-mqa-tied-window": _case(
        "qwen3",
        head_dim=10,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen3-bias-dynamic": _case(
        "qwen3",
        head_dim=8,
        attention_bias=True,
        max_position_embeddings=12,
        rope_parameters={"rope_type": "dynamic", "factor": 2.5, "rope_theta": 10000.0},
    ),
    "qwen3_moe-norm-topk": _case(
        "qwen3_moe",
        rms_norm_eps=_EPS,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=20,
        norm_topk_prob=True,
    ),
    "qwen3_moe-sparse-step": _case(
        "qwen3_moe",
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "qwen3_moe-dense-layer-window": _case(
        "qwen3_moe",
        num_hidden_layers=3,
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        mlp_only_layers=[1],
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=6,
    ),
    "gemma2-softcaps": _case(
        "gemma2",
        rms_norm_eps=10 * _EPS,
        head_dim=16,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=16,
    ),
    "gemma2-no-softcaps": _case(
        "gemma2",
        head_dim=8,
        num_key_value_heads=1,
        num_hidden_layers=3,
        sliding_window=64,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        query_pre_attn_scalar=24,
        attention_bias=True,
    ),
    "gemma2-layer-types-untied": _case(
        "gemma2",
        head_dim=12,
        num_key_value_heads=4,
        sliding_window=4,
        layer_types=[_FULL, _SLIDE],
        tie_word_embeddings=False,
    ),
    "gemma3-pattern": _case(
        "gemma3_text",
        rms_norm_eps=10 * _EPS,
        head_dim=16,
        num_key_value_heads=1,
        num_hidden_layers=4,
        sliding_window=5,
        sliding_window_pattern=3,
        query_pre_attn_scalar=16,
    ),
    "gemma3-linear": _case(
        "gemma3_text",
        head_dim=12,
        num_hidden_layers=3,
        sliding_window=6,
        sliding_window_pattern=2,
        rope_theta=20000.0,
        rope_local_base_freq=500.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        final_logit_softcapping=4.0,
        query_pre_attn_scalar=12,
    ),
    "gemma3-rope-parameters-untied": _case(
        "gemma3_text",
        head_dim=8,
        sliding_window=7,
        layer_types=[_FULL, _SLIDE],
        rope_parameters={
            _FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 3000.0},
            _SLIDE: {"rope_type": "default", "rope_theta": 100.0},
        },
        tie_word_embeddings=False,
        num_key_value_heads=4,
    ),
    "gemma3-multimodal": {
        "model_type": "gemma3",
        "text_config": _case(
            "gemma3_text",
            head_dim=16,
            num_hidden_layers=2,
            sliding_window=5,
            sliding_window_pattern=2,
        ),
        "vision_config": _VISION,
        "image_token_index": 90,
        "boi_token_index": 91,
        "eoi_token_index": 92,
        "mm_tokens_per_image": 4,
    },
    "phi3-mha": _case("phi3", rms_norm_eps=_EPS, num_key_value_heads=4, pad_token_id=0),
    "phi3-longrope-short": _case("phi3", pad_token_id=0, **_longrope(32)),
    "phi3-longrope-long-tied": _case(
        "phi3", pad_token_id=0, tie_word_embeddings=True, **_longrope(16)
    ),
    "phi3-partial-window": _case(
        "phi3",
        hidden_size=64,
        pad_token_id=0,
        num_key_value_heads=1,
        partial_rotary_factor=0.5,
        sliding_window=6,
        **_longrope(16),
    ),
    "smollm3-nope": _case("smollm3", rms_norm_eps=_EPS, num_hidden_layers=5, pad_token_id=0),
    "smollm3-listed-untied": _case(
        "smollm3",
        num_hidden_layers=3,
        no_rope_layers=[0, 1, 1],
        attention_bias=True,
        mlp_bias=True,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        pad_token_id=0,
        rope_theta=5000.0,
    ),
    "smollm3-window": _case(
        "smollm3",
        num_hidden_layers=3,
        no_rope_layer_interval=3,
        use_sliding_window=True,
        sliding_window=6,
        num_key_value_heads=4,
        pad_token_id=0,
    ),
    "olmo2-mha": _case("olmo2", rms_norm_eps=_EPS, num_key_value_heads=4),
    "olmo2-gqa-tied": _case("olmo2", tie_word_embeddings=True, rope_theta=500000.0),
    "olmo2-mqa-bias-yarn": _case(
        "olmo2", num_key_value_heads=1, attention_bias=True, rope_scaling=_YARN
    ),
    "olmo3-pattern-yarn": _case(
        "olmo3",
        rms_norm_eps=_EPS,
        num_hidden_layers=4,
        num_key_value_heads=4,
        sliding_window=6,
        rope_scaling=_YARN,
    ),
    "olmo3-layer-types-gqa": _case(
        "olmo3",
        num_hidden_layers=3,
        sliding_window=5,
        layer_types=[_FULL, _SLIDE, _FULL],
        attention_bias=True,
    ),
    "olmo3-rope-parameters-tied": _case(
        "olmo3",
        sliding_window=7,
        layer_types=[_SLIDE, _FULL],
        rope_parameters={
            _FULL: {**_YARN, "rope_theta": 3000.0},
            _SLIDE: {"rope_type": "default", "rope_theta": 100.0},
        },
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "exaone4-pattern": _case(
        "exaone4", rms_norm_eps=_EPS, num_hidden_layers=5, sliding_window=6, head_dim=16
    ),
    "exaone4-full-tied": _case(
        "exaone4",
        sliding_window=None,
        layer_types=[_FULL, _FULL],
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "exaone4-layer-types-llama3": _case(
        "exaone4",
        num_hidden_layers=3,
        num_key_value_heads=4,
        sliding_window=5,
        layer_types=[_SLIDE, _FULL, _SLIDE],
        rope_theta=1000000.0,
        rope_scaling=_LLAMA3,
    ),
    "glm4-gqa": _case("glm4", rms_norm_eps=_EPS, head_dim=16, pad_token_id=0),
    "glm4-mqa-no-bias-tied": _case(
        "glm4",
        head_dim=8,
        num_key_value_heads=1,
        attention_bias=False,
        tie_word_embeddings=True,
        pad_token_id=0,
        rope_theta=500.0,
    ),
    "glm4-rope-parameters": _case(
        "glm4",
        head_dim=16,
        num_key_value_heads=4,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.25,
        },
    ),
    "seed_oss-gqa": _case("seed_oss", rms_norm_eps=_EPS, head_dim=16),
    "seed_oss-biases-tied": _case(
        "seed_oss",
        head_dim=8,
        num_key_value_heads=1,
        attention_out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "seed_oss-no-bias-linear": _case(
        "seed_oss",
        head_dim=12,
        num_key_value_heads=4,
        attention_bias=False,
        rope_scaling={"rope_type": "linear", "factor": 3.0},
    ),
    "glm4_moe-one-dense": _case(
        "glm4_moe",
        rms_norm_eps=_EPS,
        head_dim=12,
        num_hidden_layers=3,
        n_routed_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=20,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
        attention_bias=True,
    ),
    "glm4_moe-groups-two-shared": _case(
        "glm4_moe",
        head_dim=16,
        num_key_value_heads=1,
        n_routed_experts=9,
        n_group=3,
        topk_group=2,
        num_experts_per_tok=4,
        moe_intermediate_size=16,
        n_shared_experts=2,
        first_k_dense_replace=0,
        partial_rotary_factor=0.25,
        tie_word_embeddings=True,
    ),
    "glm4_moe-not-renormalized-yarn": _case(
        "glm4_moe",
        head_dim=16,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=24,
        norm_topk_prob=False,
        routed_scaling_factor=1.7,
        rope_scaling={**_YARN, "partial_rotary_factor": 1.0, "rope_theta": 1000.0},
    ),
    "ministral3-yarn-growth": _case(
        "ministral3",
        rms_norm_eps=_EPS,
        head_dim=16,
        rope_parameters={
            **_YARN,
            "rope_theta": 1000.0,
            "original_max_position_embeddings": 5,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
        },
    ),
    "ministral3-window-tied": _case(
        "ministral3",
        head_dim=20,
        num_key_value_heads=1,
        sliding_window=6,
        tie_word_embeddings=True,
        rope_parameters={
            **_YARN,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.1,
            "beta_fast": 4.0,
        },
    ),
    "ministral3-default-parameters": _case("ministral3", head_dim=12, num_key_value_heads=4),
    "mistral3-ministral": {
        "model_type": "mistral3",
        "image_token_index": 90,
        "tie_word_embeddings": False,
        "text_config": _case(
            "ministral3",
            head_dim=16,
            rope_parameters={
                **_YARN,
                "rope_theta": 1000.0,
                "original_max_position_embeddings": 6,
                "llama_4_scaling_beta": 0.2,
            },
        ),
        "vision_config": _PIXTRAL,
    },
    "mistral3-ministral-tied": {
        "model_type": "mistral3",
        "image_token_index": 90,
        "tie_word_embeddings": True,
        "text_config": _case(
            "ministral3",
            head_dim=12,
            num_key_value_heads=1,
            sliding_window=7,
            tie_word_embeddings=True,
            rope_parameters={
                **_YARN,
                "rope_theta": 100.0,
                "original_max_position_embeddings": 4,
                "llama_4_scaling_beta": 0.1,
            },
        ),
        "vision_config": _PIXTRAL,
    },
    "mistral3-mistral": {
        "model_type": "mistral3",
        "image_token_index": 90,
        "tie_word_embeddings": False,
        "text_config": _case("mistral", rms_norm_eps=_EPS, head_dim=20, sliding_window=None),
        "vision_config": _PIXTRAL,
    },
    "gemma4-dense-keys-as-values": _gemma4(
        rms_norm_eps=_EPS,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        final_logit_softcapping=3.0,
        sliding_window=5,
        layer_types=[_SLIDE, _SLIDE, _FULL],
        num_hidden_layers=3,
    ),
    "gemma4-per-layer-shared": _gemma4(
        num_hidden_layers=6,
        num_key_value_heads=1,
        hidden_size_per_layer_input=10,
        vocab_size_per_layer_input=101,
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        sliding_window=7,
        layer_types=[_SLIDE, _FULL, _SLIDE, _FULL, _SLIDE, _FULL],
    ),
    "gemma4-experts": _gemma4(
        rms_norm_eps=_EPS,
        enable_moe_block=True,
        num_experts=5,
        top_k_experts=2,
        moe_intermediate_size=20,
        attention_k_eq_v=True,
        num_global_key_value_heads=2,
        sliding_window=4,
        layer_types=[_SLIDE, _FULL, _FULL],
        num_hidden_layers=3,
        tie_word_embeddings=False,
    ),
    "gemma4-multimodal": {
        "model_type": "gemma4",
        "text_config": {
            **_gemma4(
                num_hidden_layers=3,
                hidden_size_per_layer_input=6,
                vocab_size_per_layer_input=97,
                num_kv_shared_layers=1,
                layer_types=[_SLIDE, _FULL, _FULL],
                sliding_window=6,
            ),
            "model_type": "gemma4_text",
        },
        "vision_config": None,
        "audio_config": None,
    },
    "gpt_oss-top2-yarn": _case(
        "gpt_oss",
        rms_norm_eps=_EPS,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        rope_scaling={**_YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
    ),
    "gpt_oss-layer-types-mqa-tied": _case(
        "gpt_oss",
        head_dim=8,
        num_hidden_layers=3,
        num_key_value_heads=1,
        num_local_experts=5,
        num_experts_per_tok=3,
        sliding_window=7,
        layer_types=[_FULL, _SLIDE, _FULL],
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "gpt_oss-no-bias-default-rope": _case(
        "gpt_oss",
        head_dim=16,
        num_key_value_heads=4,
        num_local_experts=3,
        num_experts_per_tok=1,
        attention_bias=False,
    ),
    "qwen3_5-pattern": _case(
        "qwen3_5_text",
        rms_norm_eps=_EPS,
        head_dim=16,
        num_hidden_layers=5,
        **_DELTA,
        rope_parameters=_MROPE,
    ),
    "qwen3_5-square-heads": _case(
        "qwen3_5_text",
        head_dim=16,
        num_hidden_layers=2,
        layer_types=[_FULL, _LINEAR],
        **_SQUARE,
        rope_parameters=_MROPE,
    ),
    "qwen3_5-one-key-head-tied-bias": _case(
        "qwen3_5_text",
        head_dim=8,
        num_key_value_heads=1,
        num_hidden_layers=3,
        layer_types=[_FULL, _LINEAR, _LINEAR],
        attention_bias=True,
        tie_word_embeddings=True,
        **{**_DELTA, "linear_num_key_heads": 1, "linear_num_value_heads": 3},
        rope_parameters={**_MROPE, "partial_rotary_factor": 0.5},
    ),
    "qwen3_5-multimodal": {
        "model_type": "qwen3_5",
        "text_config": _case(
            "qwen3_5_text",
            head_dim=16,
            num_hidden_layers=2,
            full_attention_interval=2,
            **{**_DELTA, "linear_conv_kernel_dim": 2, "linear_num_value_heads": 2},
            rope_parameters=_MROPE,
        ),
        "vision_config": _QWEN_VISION,
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    },
    "qwen3_next-grouped-heads": _case(
        "qwen3_next", rms_norm_eps=_EPS, head_dim=16, num_hidden_layers=4, **_DELTA, **_SHARED
    ),
    "qwen3_next-square-heads": _case(
        "qwen3_next",
        head_dim=16,
        num_hidden_layers=3,
        full_attention_interval=2,
        tie_word_embeddings=True,
        **_SQUARE,
        **_SHARED,
    ),
    "qwen3_next-dense-layer": _case(
        "qwen3_next",
        head_dim=8,
        num_key_value_heads=1,
        num_hidden_layers=3,
        layer_types=[_LINEAR, _FULL, _LINEAR],
        mlp_only_layers=[1],
        norm_topk_prob=False,
        tie_word_embeddings=True,
        **{**_DELTA, "linear_num_value_heads": 2, "linear_value_head_dim": 8},
        **_SHARED,
    ),
    "qwen3_next-sparse-step": _case(
        "qwen3_next",
        head_dim=16,
        attention_bias=True,
        full_attention_interval=2,
        decoder_sparse_step=2,
        **{**_DELTA, "linear_num_key_heads": 1, "linear_conv_kernel_dim": 3},
        **_SHARED,
    ),
    "qwen3_5_moe-pattern": _case(
        "qwen3_5_moe_text",
        rms_norm_eps=_EPS,
        head_dim=16,
        num_hidden_layers=4,
        **_DELTA,
        **_SHARED,
        rope_parameters=_MROPE,
    ),
    "qwen3_5_moe-square-heads": _case(
        "qwen3_5_moe_text",
        head_dim=16,
        num_hidden_layers=3,
        layer_types=[_FULL, _LINEAR, _FULL],
        **_SQUARE,
        **_SHARED,
        rope_parameters=_MROPE,
    ),
    "qwen3_5_moe-top1-tied": _case(
        "qwen3_5_moe_text",
        head_dim=16,
        num_hidden_layers=2,
        layer_types=[_FULL, _LINEAR],
        tie_word_embeddings=True,
        **_DELTA,
        **{**_SHARED, "num_experts_per_tok": 1},
        rope_parameters=_MROPE,
    ),
    "qwen3_5_moe-multimodal": {
        "model_type": "qwen3_5_moe",
        "text_config": _case(
            "qwen3_5_moe_text",
            head_dim=16,
            full_attention_interval=2,
            **_DELTA,
            **_SHARED,
            rope_parameters=_MROPE,
        ),
        "vision_config": _QWEN_VISION,
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    },
    "lfm2_moe-one-dense": _case(
        "lfm2_moe",
        norm_eps=_EPS,
        num_hidden_layers=3,
        layer_types=["conv", _FULL, "conv"],
        num_dense_layers=1,
        moe_intermediate_size=24,
        num_experts=5,
        num_experts_per_tok=2,
    ),
    "lfm2_moe-no-bias-scaled": _case(
        "lfm2_moe",
        layer_types=[_FULL, "conv"],
        num_dense_layers=0,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=3,
        use_expert_bias=False,
        routed_scaling_factor=2.5,
        conv_bias=True,
        tie_word_embeddings=False,
    ),
    "lfm2_moe-not-renormalized": _case(
        "lfm2_moe",
        num_key_value_heads=1,
        layer_types=["conv", _FULL],
        num_dense_layers=0,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=1,
        norm_topk_prob=False,
        conv_L_cache=4,
    ),
    "lfm2-layer-types": _case(
        "lfm2",
        norm_eps=_EPS,
        num_hidden_layers=3,
        layer_types=["conv", _FULL, "conv"],
        block_auto_adjust_ff_dim=False,
    ),
    "lfm2-old-config-bias": {
        "model_type": "lfm2",
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "block_ff_dim": 70,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.3,
        "full_attn_idxs": [2],
        "conv_bias": True,
        "conv_L_cache": 4,
        "rope_theta": 500.0,
        "tie_embedding": False,
    },
    "lfm2-attention-first": _case(
        "lfm2",
        num_key_value_heads=4,
        layer_types=[_FULL, "conv"],
        conv_L_cache=2,
        block_multiple_of=8,
        tie_word_embeddings=True,
    ),
    "granite-multipliers": _case(
        "granite",
        rms_norm_eps=10 * _EPS,
        embedding_multiplier=6.0,
        logits_scaling=4.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
    ),
    "granite-bias-tied": _case(
        "granite",
        attention_bias=True,
        mlp_bias=True,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        embedding_multiplier=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
    ),
    "granite-mha-linear": _case(
        "granite",
        num_key_value_heads=4,
        attention_multiplier=0.35,
        rope_scaling={"type": "linear", "factor": 2.0},
    ),
    "starcoder2-tied": _case("starcoder2", norm_epsilon=_EPS),
    "starcoder2-window-untied": _case(
        "starcoder2", num_key_value_heads=1, sliding_window=5, tie_word_embeddings=False
    ),
    "starcoder2-no-bias": _case(
        "starcoder2", num_key_value_heads=4, use_bias=False, hidden_act="gelu", rope_theta=999.0
    ),
    "gpt2-tied": {"model_type": "gpt2", **_GPT2, "layer_norm_epsilon": _EPS},
    "gpt2-inner-untied": {
        "model_type": "gpt2",
        **_GPT2,
        "n_inner": 40,
        "n_head": 2,
        "tie_word_embeddings": False,
        "activation_function": "gelu",
    },
    "gpt2-scaled-by-depth": {
        "model_type": "gpt2",
        **_GPT2,
        "n_layer": 3,
        "n_head": 1,
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
        "activation_function": "relu",
    },
}


def vocab_of(config: Mapping[str, Any]) -> int:
    return int(config.get("text_config", config)["vocab_size"])


def saved_form(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The config and the names and shapes of the tensors that transformers writes."""
    from safetensors import safe_open
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        model = _class(config).from_config(AutoConfig.from_pretrained(folder))
        model.save_pretrained(folder / "saved")
        saved = json.loads((folder / "saved/config.json").read_text())
        with safe_open(folder / "saved/model.safetensors", "np") as file:
            names = file.keys()
            shapes = {key: list(file.get_slice(key).get_shape()) for key in names}
    return saved, shapes


def reference_logits(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], tokens: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [T, V] twice: of the whole prompt at once, and of one token after the other."""
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name), config, tensors)
        return tuple(  # type: ignore[return-value]
            logits.numpy() for logits in _forward(_load(config, folder), torch.tensor([tokens]))
        )


def _forward(model: Any, ids: Any) -> Iterator[Any]:
    import torch
    from transformers import DynamicCache

    with torch.no_grad():
        yield model(ids, use_cache=False).logits[0]
        cache = DynamicCache(config=model.config.get_text_config())
        rows = [
            model(ids[:, n : n + 1], past_key_values=cache, use_cache=True).logits[0, -1]
            for n in range(ids.shape[1])
        ]
        yield torch.stack(rows)


def _load(config: Mapping[str, Any], folder: Path) -> Any:
    import torch

    model, info = _class(config).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    assert not problems, f"transformers does not take these weights: {problems}"
    return model.eval()


def _class(config: Mapping[str, Any]) -> Any:
    import transformers

    if "vision_config" in config:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def write_golden(name: str) -> None:
    config = CASES[name]
    saved, shapes = saved_form(config)
    tokens = random_tokens(TOKENS, vocab_of(config))
    whole, stepwise = reference_logits(config, random_tensors(shapes), tokens)
    spread = float(np.abs(whole - stepwise).max() / np.abs(whole).max())
    arrays = {"whole": whole}
    if spread > 1e-4:  # RoPE that depends on the length: the two differ by design
        arrays["stepwise"] = stepwise
    for key in ("transformers_version", "dtype"):
        saved.pop(key, None)
    text = json.dumps(
        {"config": config, "saved_config": saved, "tokens": tokens, "shapes": shapes}, indent=None
    )
    (GOLDEN / f"{name}.json").write_text(text + "\n")
    np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)
    print(f"{name}: largest logit {np.abs(whole).max():.2f}, whole to stepwise {spread:.1e}")


def _settle_version(all_of_them: bool) -> None:
    """All cases are of one version of transformers, which is noted beside them."""
    noted, own = GOLDEN / "transformers.txt", version("transformers")
    if not all_of_them and noted.exists() and noted.read_text().strip() != own:
        sys.exit(f"the other cases are of transformers {noted.read_text().strip()}, not {own}")
    noted.write_text(f"{own}\n")


def main() -> None:
    warnings.filterwarnings("ignore")
    GOLDEN.mkdir(exist_ok=True)
    names = sys.argv[1:] or list(CASES)
    _settle_version(all_of_them=not sys.argv[1:])
    if not sys.argv[1:]:
        for old in GOLDEN.iterdir():
            if old.suffix in (".json", ".npz") and old.stem not in CASES and "gguf" not in old.stem:
                old.unlink()
    for name in names:
        write_golden(name)


if __name__ == "__main__":
    main()
