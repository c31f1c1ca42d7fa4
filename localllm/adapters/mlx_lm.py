"""Adapter folders of MLX-LM: adapter_config.json and adapters.safetensors.

Source: mlx_lm/tuner/lora.py and tuner/utils.py of https://github.com/ml-explore/mlx-lm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localllm.adapters.files import (
    MAX_RANK,
    AdapterFile,
    Endings,
    ModulePair,
    check_targets,
    checked_scale,
    find_pairs,
)
from localllm.checkpoint.safetensors import SafetensorsFile
from localllm.errors import CheckpointError, UnsupportedModel
from localllm.models.config import MAX_LAYERS, Config

WEIGHTS = "adapters.safetensors"
_ENDINGS = Endings(".lora_a", ".lora_b", ".m")


def read_mlx(folder: Path, values: Mapping[str, Any]) -> AdapterFile:
    """values: adapter_config.json; see `read_peft`."""
    config = Config(values, folder / "adapter_config.json")
    kind = config.text("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedModel(
            f"{config.source}: fine_tune_type = {kind[:20]!r} is not supported",
            hint="Merge it into its model with `mlx_lm.fuse` and load that.",
        )
    parameters = config.section("lora_parameters")
    rank = parameters.integer("rank", high=MAX_RANK)
    scale = parameters.number("scale", above=-1e30)
    file = SafetensorsFile(folder / WEIGHTS)
    try:
        pairs = {}
        for module, (a, b, magnitude) in find_pairs(file, _ENDINGS, dora=kind == "dora").items():
            if len(a.shape) == 2 and a.shape[1] != rank:
                raise CheckpointError(
                    f"{file.path}: the rank of {module} is {a.shape[1]}; "
                    f"adapter_config.json says {rank}"
                )
            checked = checked_scale(file.path, module, scale)
            pairs[module] = ModulePair(a, b, checked, magnitude)
        keys = [str(key) for key in parameters.items("keys")] if parameters.has("keys") else []
        if keys:
            check_targets(file.path, pairs, keys)
    except BaseException:
        file.close()
        raise
    last = config.integer("num_layers", -1, low=-1, high=MAX_LAYERS)
    return AdapterFile(
        file,
        pairs,
        transposed=True,
        last_layers=None if last < 0 else last,
        named=tuple(keys),
    )
