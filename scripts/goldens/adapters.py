"""Writes tests/adapters/golden: what PEFT computes for tiny models with an adapter.

The models are those of tests/models/golden. PEFT makes each adapter and saves it once, which gives
its config and the names and shapes of its tensors; their values are then drawn by
tests/adapters/tiny.py and read back by PEFT's own loader.

    python -m scripts.goldens.adapters [case …]
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # instead of this folder, whose modules hide libraries by their names
    sys.path[0] = str(ROOT)

from scripts.goldens.models import _load  # noqa: E402
from tests.adapters.tiny import adapter_tensors, write_adapter  # noqa: E402
from tests.models.running import golden  # noqa: E402

GOLDEN = ROOT / "tests/adapters/golden"
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# name -> (model, dtype of the file, LoraConfig)
_DELTA = ["in_proj_qkv", "in_proj_z", "out_proj"]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-defaults": ("llama-gqa", "float32", {}),
    "llama-rslora-patterns": (
        "llama-gqa",
        "float32",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": [*_ATTENTION, "gate_proj", "up_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, ".*v_proj": 3, "down_proj": 9},
            "alpha_pattern": {"o_proj": 5, r"model\.layers\.0\.mlp\.up_proj": 11, "k_proj": 1.5},
        },
    ),
    "qwen2-one-layer": (
        "qwen2-gqa",
        "bfloat16",
        {"r": 3, "lora_alpha": 5, "target_modules": _ATTENTION, "layers_to_transform": [1]},
    ),
    "phi3-all-linear": (
        "phi3-mha",
        "float16",
        {"r": 5, "lora_alpha": 7, "target_modules": "all-linear", "use_rslora": True},
    ),
    "gpt2-conv1d": (
        "gpt2-tied",
        "float32",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "rank_pattern": {"mlp.c_proj": 6},
            "fan_in_fan_out": True,
        },
    ),
    "qwen3_5-mixers": (
        "qwen3_5-pattern",
        "float32",
        {
            "r": 3,
            "lora_alpha": 4,
            "target_modules": [*_ATTENTION, "o_proj", *_DELTA, "gate_proj", "down_proj"],
        },
    ),
    "qwen3_5-dora": (
        "qwen3_5-one-key-head-tied-bias",
        "float32",
        {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": [*_ATTENTION, *_DELTA]},
    ),
    "lfm2-mixers-biases": (
        "lfm2-old-config-bias",
        "float32",
        {"r": 3, "lora_alpha": 4, "target_modules": [*_ATTENTION, "in_proj", "out_proj", "w1"]},
    ),
    "qwen3_moe-experts": (
        "qwen3_moe-norm-topk",
        "float32",
        {
            "r": 3,
            "lora_alpha": 4,
            "target_modules": _ATTENTION,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
    "gpt_oss-experts": (
        "gpt_oss-top2-yarn",
        "float32",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "glm4_moe-one-layers-down": (
        "glm4_moe-one-dense",
        "bfloat16",
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "target_parameters": ["layers.1.mlp.experts.down_proj"],
        },
    ),
    "gemma3-regex": (
        "gemma3-pattern",
        "float32",
        {"r": 2, "lora_alpha": 4, "target_modules": r".*\.(self_attn\.[qo]|mlp\.gate)_proj"},
    ),
    "llama-dora": (
        "llama-gqa",
        "float32",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_dora": True,
            "use_rslora": True,
            "target_modules": "all-linear",
            "rank_pattern": {"down_proj": 7},
        },
    ),
    "qwen2-dora-biases": (
        "qwen2-gqa",
        "float16",
        {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": _ATTENTION},
    ),
    "phi3-dora-fused": (
        "phi3-mha",
        "float32",
        {"r": 5, "lora_alpha": 7, "use_dora": True, "target_modules": "all-linear"},
    ),
    "gpt2-dora-conv1d": (
        "gpt2-tied",
        "float32",
        {
            "r": 4,
            "lora_alpha": 8,
            "use_dora": True,
            "target_modules": ["c_attn", "c_proj", "c_fc"],
            "fan_in_fan_out": True,
        },
    ),
}


def write_golden(name: str) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors import safe_open

    base, dtype, settings = CASES[name]
    case = golden(base)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        case.write(folder / "model")
        model = get_peft_model(
            _load(case.config, folder / "model"), LoraConfig(task_type="CAUSAL_LM", **settings)
        )
        model.save_pretrained(folder / "saved")
        config = json.loads((folder / "saved/adapter_config.json").read_text())
        config["base_model_name_or_path"] = "model"
        with safe_open(folder / "saved/adapter_model.safetensors", "np") as file:
            names = file.keys()
            shapes = {key: list(file.get_slice(key).get_shape()) for key in names}
        write_adapter(folder / "adapter", config, adapter_tensors(shapes, dtype))
        adapted = PeftModel.from_pretrained(
            _load(case.config, folder / "model"), folder / "adapter"
        ).eval()
        with torch.no_grad():
            logits = adapted(torch.tensor([case.tokens]), use_cache=False).logits[0].numpy()
    config["target_modules"] = (
        sorted(config["target_modules"])
        if isinstance(config["target_modules"], list)
        else config["target_modules"]
    )
    if config.get("target_parameters"):
        config["target_parameters"] = sorted(config["target_parameters"])
    facts = {"model": base, "dtype": dtype, "config": config, "shapes": shapes}
    (GOLDEN / f"{name}.json").write_text(json.dumps(facts) + "\n")
    np.savez_compressed(GOLDEN / f"{name}.npz", logits=logits)
    moved = np.abs(logits - case.whole).max() / np.abs(case.whole).max()
    print(f"{name}: largest logit {np.abs(logits).max():.2f}, moved by {moved:.2f} of the base's")


def main() -> None:
    warnings.filterwarnings("ignore")
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or CASES:
        write_golden(name)


if __name__ == "__main__":
    main()
