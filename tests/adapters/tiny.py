"""Small random adapters in the folders that PEFT writes, the same on every machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from localllm.checkpoint.safetensors import write_safetensors
from localllm.checkpoint.tensor import Dense
from tests.models.tiny import Shapes, random_tensors


def adapter_tensors(shapes: Shapes, dtype: str = "float32") -> dict[str, Dense]:
    """As large as to change the logits and not so large as to drown the base model's."""
    tensors = {}
    for name, value in random_tensors(shapes, seed=7).items():
        small = value * np.float32(0.3)
        if "magnitude" in name:  # of DoRA: lengths
            small = np.abs(small) + np.float32(0.5)
        if dtype == "bfloat16":
            tensors[name] = Dense((small.view(np.uint32) >> 16).astype(np.uint16), "bfloat16")
        elif dtype == "float16":
            tensors[name] = Dense(small.astype(np.float16), "float16")
        else:
            tensors[name] = Dense(small, "float32")
    return tensors


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Dense],
    name: str = "adapter_model.safetensors",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(folder / name, tensors, {"format": "pt"})
    return folder
