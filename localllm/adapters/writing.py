"""Adapters on disk in Hugging Face PEFT's format, which `peft` and `load_adapter` both read.

A module that holds several of our linears (Phi's qkv_proj, GPT-2's c_attn) has one pair there: the
ranks of its parts stand one after the other, and B is zero outside of a part's own rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from localllm.adapters.naming import Module, keeps_conv1d, modules_of, short_names
from localllm.adapters.peft import EXPERT_PARAMETERS, PREFIX, WEIGHTS, WRAPPED
from localllm.checkpoint.atomic import write_json
from localllm.checkpoint.safetensors import write_safetensors
from localllm.checkpoint.shards import read_json
from localllm.errors import CheckpointError, InvalidRequest
from localllm.files import sync_folder
from localllm.spec import DecoderSpec

if TYPE_CHECKING:
    from localllm.train.program import Layout

CONFIG = "adapter_config.json"


class AdapterConfig(Protocol):
    """What of a training's config goes into the file; ranks and scales come from the layout."""

    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def rslora(self) -> bool: ...
    @property
    def dora(self) -> bool: ...
    @property
    def alpha_pattern(self) -> Mapping[str, float]: ...


def save_adapter(
    folder: str | Path,
    layout: Layout,
    parameters: np.ndarray,
    *,
    config: AdapterConfig,
    base_model: str,
    spec: DecoderSpec,
) -> Path:
    """Writes adapter_model.safetensors (float32) and adapter_config.json; gives the folder.

    parameters: float32 [layout.size]. base_model: what the adapter was trained on, for people and
    for `peft`. A kill at any moment leaves the old adapter, the new one, or a folder that is none.
    Raises InvalidRequest for parameters that are no adapter or not finite, CheckpointError where
    the folder cannot be written.
    """
    folder = Path(folder)
    if not layout.scales:
        raise InvalidRequest("these parameters are whole weights, not an adapter")
    if not np.isfinite(parameters).all():
        raise InvalidRequest("the adapter holds NaN or infinite values, so it is not saved")
    values = layout.views(parameters)
    alphas = [config.alpha, *config.alpha_pattern.values()]
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, tuple[int, float]] = {}
    found = modules_of(spec, layout.targets)
    experts = [module.name for module in found if module.experts is not None]
    for module in found:
        scale = layout.scales[module.adapted[0]]
        pair = _joined(module, layout, values, scale)
        rank = pair["lora_A.weight"].shape[-2]
        for ending, array in pair.items():
            if module.experts is None:
                tensors[f"{PREFIX}{module.name}.{ending}"] = array
            else:
                wrapper = _wrapper(module.name, experts)
                tensors[f"{PREFIX}{wrapper}.{ending}"] = _flat(ending, array)
        modules[module.name] = rank, _alpha(scale, rank, config.rslora, alphas)
    settings = _settings(modules, experts, config, base_model, spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _differs(folder / CONFIG, settings):
            (folder / CONFIG).unlink(missing_ok=True)  # never beside matrices that it is not of
            sync_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from error
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, settings)
    return folder


def _joined(
    module: Module, layout: Layout, values: Mapping[str, np.ndarray], scale: float
) -> dict[str, np.ndarray]:
    """A, B and magnitude of a module by their endings; scale: the whole module's."""
    parts = module.adapted
    magnitudes = [f"{part}.magnitude" in values for part in parts]
    if any(magnitudes) and not (all(magnitudes) and parts == module.targets):
        left = sorted({*module.targets} - {*parts})
        raise InvalidRequest(
            f"DoRA on part of {module.name}: {', '.join(left) or 'some magnitudes'} missing",
            hint="adapt all linears of that module, or none",
        )
    if parts == module.targets and len(parts) == 1:
        a, b = values[f"{parts[0]}.a"], values[f"{parts[0]}.b"]
    else:
        a = np.concatenate([values[f"{part}.a"] for part in parts], axis=-2)
        *stacked, ranks, _ = a.shape
        b = np.zeros((*stacked, sum(module.rows.values()), ranks), np.float32)
        row = column = 0
        for target in module.targets:
            rows = module.rows[target]
            if target in parts:
                own = values[f"{target}.b"]
                ratio = np.float32(layout.scales[target] / scale)  # 1 unless ranks differ
                b[..., row : row + rows, column : column + own.shape[-1]] = own * ratio
                column += own.shape[-1]
            row += rows
    found = {"lora_A.weight": a, "lora_B.weight": b}
    if all(magnitudes):
        found["lora_magnitude_vector"] = np.concatenate(
            [values[f"{part}.magnitude"] for part in parts]
        )
    if module.mixed is not None:
        for name in found.keys() - {"lora_A.weight"}:
            found[name] = np.take(found[name], module.mixed, axis=0 if found[name].ndim < 3 else 1)
    return found


def _wrapper(name: str, adapted: Sequence[str]) -> str:
    """What PEFT calls its wrapper of a parameter: the last of a module's is the outermost."""
    owner, _, parameter = name.rpartition(".")
    later = EXPERT_PARAMETERS[EXPERT_PARAMETERS.index(parameter) + 1 :]
    return owner + WRAPPED * sum(f"{owner}.{other}" in adapted for other in later)


def _flat(ending: str, array: np.ndarray) -> np.ndarray:
    """A [E, r, in] as [E * r, in], B [E, out, r] as [out, r * E]."""
    if ending == "lora_B.weight":
        array = array.transpose(1, 2, 0)
        return np.ascontiguousarray(array.reshape(len(array), -1))
    return array.reshape(-1, array.shape[-1])


def _alpha(scale: float, rank: int, root: bool, likely: list[float]) -> float:
    """What divided by the rank (or its root) is the scale, to the bit where there is such."""
    divisor = math.sqrt(rank) if root else rank
    near = scale * divisor
    tried = [*likely, near, math.nextafter(near, 0), math.nextafter(near, math.inf)]
    return next((alpha for alpha in tried if alpha / divisor == scale), near)


def _settings(
    modules: Mapping[str, tuple[int, float]],
    experts: Sequence[str],
    config: AdapterConfig,
    base_model: str,
    spec: DecoderSpec,
) -> dict[str, Any]:
    rank = Counter(rank for rank, _ in modules.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in modules.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": keeps_conv1d(spec),
        "init_lora_weights": True,
        "target_modules": short_names(spec, modules.keys() - set(experts)),
        **({"target_parameters": sorted(experts)} if experts else {}),
        "rank_pattern": {name: own for name, (own, _) in modules.items() if own != rank},
        "alpha_pattern": {
            name: _plain(own) for name, (_, own) in modules.items() if own != alpha
        },
    }  # fmt: skip


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _differs(path: Path, settings: Mapping[str, Any]) -> bool:
    if not path.exists():
        return False
    try:
        return read_json(path) != settings
    except CheckpointError:
        return True
