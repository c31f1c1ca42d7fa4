"""From a folder to an adapter for a model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from localllm.adapters import mlx_lm, peft
from localllm.adapters.dora import Base, with_gains
from localllm.adapters.files import AdapterFile
from localllm.adapters.lora import LoraAdapter, make_adapter
from localllm.adapters.mapping import map_targets
from localllm.checkpoint.shards import read_json
from localllm.errors import CheckpointError, InvalidRequest, UnsupportedModel
from localllm.spec import DecoderSpec

_PICKLE = "adapter_model.bin"


def load_adapter(
    folder: str | Path,
    spec: DecoderSpec,
    *,
    name: str | None = None,
    base: Base | None = None,
    weight: float = 1.0,
) -> LoraAdapter:
    """Reads a PEFT or MLX-LM folder for the model that `spec` describes.

    name: None for the folder's. base: the model's weights (`weights_in`), which DoRA needs.
    weight: how much of it is added, as if it had been saved with so many times its scale.
    Raises CheckpointError for files that are damaged or do not fit the model or each other,
    UnsupportedModel for what is sound but not computed here, InvalidRequest for a weight that is
    no number.
    """
    if not math.isfinite(weight):
        raise InvalidRequest(f"an adapter's weight must be a number, not {weight}")
    folder = Path(folder)
    adapter = _open(folder)
    try:
        targets, magnitudes = map_targets(adapter, spec)
    finally:
        adapter.file.close()
    if weight != 1.0:
        targets = {
            target: replace(pair, scale=pair.scale * weight) for target, pair in targets.items()
        }
    if magnitudes:
        if base is None:
            raise UnsupportedModel(
                f"{folder}: DoRA scales rows of the adapted weights, and the base model's are not "
                "at hand",
                hint="Merge the adapter into its model with PEFT (merge_and_unload).",
            )
        targets = with_gains(folder, targets, magnitudes, base, keep=weight == 1.0)
    return make_adapter(name or folder.resolve().name, targets)


def _open(folder: Path) -> AdapterFile:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is no folder", hint="Name the folder that holds adapter_config.json."
        )
    if not (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: has no adapter_config.json, so it is no adapter")
    if (folder / peft.WEIGHTS).exists():
        return peft.read_peft(folder, read_json(folder / "adapter_config.json"))
    if (folder / mlx_lm.WEIGHTS).exists():
        return mlx_lm.read_mlx(folder, read_json(folder / "adapter_config.json"))
    if (folder / _PICKLE).exists():
        raise CheckpointError(
            f"{folder / _PICKLE}: pickled weights are never loaded, since opening them can run "
            "any program",
            hint="Save it as safetensors: PEFT's save_pretrained with safe_serialization=True, "
            "on a machine you can lose.",
        )
    raise CheckpointError(
        f"{folder}: has neither {peft.WEIGHTS} nor {mlx_lm.WEIGHTS}",
        hint="The download may be incomplete.",
    )
