"""What a config.json says about quantization: MLX's groups, or a method we do not read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localllm.errors import CheckpointError, UnsupportedModel

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
# Groups of small floats under a byte of scale: bits and group of each.
FLOATS = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
# Methods under `quant_method` whose tensors tell by themselves how they are packed.
_BY_TENSOR = ("mxfp4",)


@dataclass(frozen=True)
class Packing:
    """Codes of `bits` bits; for `group` of them a scale, and in the mode "affine" a bias."""

    bits: int
    group: int
    mode: str = "affine"


class MLXQuantization:
    """The packing of every layer: a general one, and layers of their own (None: not quantized)."""

    def __init__(self, general: Packing | None, layers: dict[str, Packing | None]) -> None:
        self._general = general
        self._layers = layers

    def packing(self, layer: str) -> Packing | None:
        """`layer` is the weight's name without `.weight`."""
        return self._layers.get(layer, self._general)


def read_quantization(path: Path, config: Mapping[str, Any]) -> MLXQuantization | None:
    """None for a model that is not quantized.

    Raises `UnsupportedModel` naming another method or mode, `CheckpointError` for values that
    make no sense. `path` is the config's, for messages.
    """
    # MLX repeats its settings under the second name; other methods use the second name only.
    key = "quantization" if config.get("quantization") is not None else "quantization_config"
    settings = config.get(key)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: '{key}' is not a JSON object")
    method = settings.get("quant_method")
    if key == "quantization_config" and method in _BY_TENSOR:
        return None
    if key == "quantization_config" and method is not None:
        raise UnsupportedModel(
            f"{path}: the model is quantized with {method}, which is not read",
            hint="Get the unquantized model, an MLX-quantized one, or a GGUF file.",
        )
    general = None
    if "bits" in settings or "group_size" in settings or "mode" in settings:
        general = _packing(path, key, settings)
    layers: dict[str, Packing | None] = {}
    for name, value in settings.items():
        layer = name.removesuffix(".weight")
        if isinstance(value, dict):
            layers[layer] = _packing(path, f"{key}: {name}", {**_defaults(general), **value})
        elif value is False:
            layers[layer] = None
    if general is None and not layers:
        raise UnsupportedModel(f"{path}: '{key}' names no way of quantization that is known")
    return MLXQuantization(general, layers)


def _defaults(general: Packing | None) -> dict[str, int | str]:
    if general is None:
        return {}
    return {"bits": general.bits, "group_size": general.group, "mode": general.mode}


def _packing(path: Path, where: str, settings: Mapping[str, Any]) -> Packing:
    mode = settings.get("mode", "affine")
    if mode != "affine" and mode not in FLOATS:
        raise UnsupportedModel(
            f"{path}: '{where}' has the quantization mode {mode!r}; "
            f"read are affine, {', '.join(FLOATS)}",
            hint="Get the model in one of these, or as a GGUF file.",
        )
    bits, group = settings.get("bits"), settings.get("group_size")
    if mode in FLOATS:
        if (bits, group) != FLOATS[mode]:
            raise CheckpointError(
                f"{path}: '{where}' has bits = {bits!r} and group_size = {group!r}; {mode} has "
                f"{FLOATS[mode][0]} and {FLOATS[mode][1]}"
            )
        return Packing(*FLOATS[mode], mode)
    if type(bits) is not int or bits not in BITS:
        raise CheckpointError(f"{path}: '{where}' has bits = {bits!r}; possible are {BITS}")
    if type(group) is not int or group not in GROUPS:
        raise CheckpointError(f"{path}: '{where}' has group_size = {group!r}; possible: {GROUPS}")
    return Packing(bits, group)
