"""Adapter folders of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

Source: https://huggingface.co/docs/peft/package_reference/lora and peft/tuners/lora in its
repository. What a config may say is known here key by key; whatever would change the result and is
not done is refused by its name, unknown keys that are set included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
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
    names_match,
)
from localllm.adapters.patterns import MAX_NAME, pattern
from localllm.checkpoint.safetensors import SafetensorsFile
from localllm.errors import CheckpointError, UnsupportedModel
from localllm.models.config import MAX_LAYERS, Config

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_ENDINGS = Endings(".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")

# Read here, or without bearing on what the tensors compute.
_KNOWN = frozenset(
    {
        *("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern"),
        *("alpha_pattern", "target_modules", "layers_to_transform", "bias", "fan_in_fan_out"),
        *("init_lora_weights", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "exclude_modules", "layers_pattern", "peft_version"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config"),
        *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
        "target_parameters",
    }
)
_REFUSED = {
    "lora_bias": "biases of LoRA's own are not computed",
    "modules_to_save": "modules trained in full cannot be loaded beside the base model",
    "trainable_token_indices": "trained token embeddings cannot be loaded beside the base model",
    "layer_replication": "replicated layers are another model than the base",
    "use_qalora": "QALoRA pools the inputs of A",
    "alora_invocation_tokens": "activated LoRA begins in the middle of a prompt",
    "arrow_config": "Arrow routes each token among several adapters",
}
_MERGE = "Merge the adapter into its model with PEFT (merge_and_unload) and load that."
# Of transformers' modules of experts, in the order in which PEFT wraps them one around the other.
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
WRAPPED = ".base_layer"
_ASKS_MODELS = (0, 19)  # PEFT 0.18.1 does not yet
# Ways to begin that leave the base model as it is; the others (PiSSA, OLoRA …) change it.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_peft(folder: Path, values: Mapping[str, Any]) -> AdapterFile:
    """values: adapter_config.json. Headers are checked, tensors not yet read.

    Raises CheckpointError for files that are damaged or contradict each other, UnsupportedModel for
    what is sound but not computed here, each named.
    """
    config = Config(values, folder / "adapter_config.json")
    _refuse_others(config)
    file = SafetensorsFile(folder / WEIGHTS)
    try:
        found = find_pairs(file, _ENDINGS, dora=config.flag("use_dora", False))
        scales = _Scales(config)
        parameters = _target_parameters(config)
        pairs = {}
        for stem, (a, b, magnitude) in found.items():
            module = stem.removeprefix(PREFIX)
            if module == stem:
                raise UnsupportedModel(f"{file.path}: {a.name} does not begin with {PREFIX!r}")
            if len(module) > MAX_NAME:
                raise CheckpointError(f"{file.path}: a module name of {len(module)} characters")
            rank = a.shape[0] if len(a.shape) == 2 else 0
            parameter = _parameter(module, parameters)
            if parameter is None:
                scale = scales.of(file.path, module, rank)
                pairs[module] = ModulePair(a, b, scale, magnitude)
            else:
                scale, experts = scales.of_experts(file.path, parameter, rank)
                pairs[parameter] = ModulePair(a, b, scale, magnitude, experts)
        linears = [module for module, pair in pairs.items() if pair.experts is None]
        named = _check_modules(config, file.path, linears, optional=bool(parameters))
    except BaseException:
        file.close()
        raise
    return AdapterFile(
        file,
        pairs,
        layers=_layers(config),
        named=named,
        named_experts=parameters,
        experts_turned=_turns_experts(config),
    )


def _target_parameters(config: Config) -> tuple[str, ...]:
    values = config.values.get("target_parameters") or ()
    if (
        not isinstance(values, list | tuple)
        or not all(isinstance(value, str) for value in values)
        or len(values) > 10_000
    ):
        raise config.bad("target_parameters", "must be a list of parameter names")
    return tuple(values)


def _turns_experts(config: Config) -> bool:
    """Whether an older PEFT wrote it than the first that asks models how they keep their experts.

    A file that does not tell its version is taken for a newer one's.
    """
    told = re.match(r"(\d{1,6})\.(\d{1,6})", str(config.values.get("peft_version")))
    return told is not None and (int(told[1]), int(told[2])) < _ASKS_MODELS


def _parameter(module: str, targets: tuple[str, ...]) -> str | None:
    """The stacked experts that a pair by this name changes, None for a linear's.

    PEFT wraps a module once for each of its parameters, and names a pair by the wrapper: what was
    wrapped first has one `.base_layer` for each wrapper around it.
    """
    owner = module
    while owner.endswith(WRAPPED):
        owner = owner.removesuffix(WRAPPED)
    around = (len(module) - len(owner)) // len(WRAPPED)
    names = [f"{owner}.{name}" for name in EXPERT_PARAMETERS]
    adapted = [name for name in names if names_match(name, targets)]
    return adapted[-1 - around] if around < len(adapted) else None


def _refuse_others(config: Config) -> None:
    kind = config.text("peft_type")
    if kind != "LORA":
        raise config.unsupported("peft_type", kind, known=("LORA",))
    for key, reason in _REFUSED.items():
        if config.values.get(key):
            raise UnsupportedModel(
                f"{config.source}: {key} is set, which is not supported: {reason}", hint=_MERGE
            )
    bias = config.text("bias", "none")
    if bias != "none":
        raise UnsupportedModel(
            f"{config.source}: bias = {bias[:20]!r} is not supported: biases of the base model "
            "were trained along",
            hint=_MERGE,
        )
    start = config.values.get("init_lora_weights", True)
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        raise UnsupportedModel(
            f"{config.source}: init_lora_weights = {str(start)[:20]!r} changes the base model, so "
            "the adapter does not fit the original one",
            hint="Save it for the original model: PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion.",
        )
    for key, value in config.values.items():
        if key not in _KNOWN and key not in _REFUSED and value:
            raise UnsupportedModel(
                f"{config.source}: {key[:60]!r} is set, an option that is not known here",
                hint="A newer PEFT may have written it. " + _MERGE,
            )
    config.flag("fan_in_fan_out", False)  # A and B lie the same way whichever it is


class _Scales:
    """alpha / r of each module, or alpha / sqrt(r) with rank-stabilized LoRA."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._rank = config.integer("r", high=MAX_RANK)
        self._alpha = config.number("lora_alpha", above=-1e-9)
        self._root = config.flag("use_rslora", False)
        self._ranks = _patterns(config, "rank_pattern")
        self._alphas = _patterns(config, "alpha_pattern")

    def of(self, path: Path, module: str, found: int) -> float:
        wanted = self._rank_of(module)
        if found != wanted:
            raise CheckpointError(
                f"{path}: the rank of {module} is {found}; adapter_config.json says {wanted}"
            )
        return self._scale(path, module, wanted)

    def of_experts(self, path: Path, parameter: str, found: int) -> tuple[float, int]:
        """The scale, and how many experts there are; found: the ranks of all together."""
        wanted = self._rank_of(parameter)
        if not found or found % wanted:
            raise CheckpointError(
                f"{path}: the experts of {parameter} have {found} ranks together; "
                f"adapter_config.json says {wanted} each"
            )
        return self._scale(path, parameter, wanted), found // wanted

    def _rank_of(self, module: str) -> int:
        rank = _first(self._ranks, module)
        return self._rank if rank is None else int(rank)

    def _scale(self, path: Path, module: str, wanted: int) -> float:
        special = _first(self._alphas, module)
        alpha = self._alpha if special is None else special
        return checked_scale(path, module, alpha / (math.sqrt(wanted) if self._root else wanted))


def _patterns(config: Config, key: str) -> list[tuple[re.Pattern[str], float]]:
    if not config.has(key):
        return []
    section = config.section(key)
    if len(section.values) > 10_000:
        raise config.bad(key, f"has {len(section.values)} entries")
    result: list[tuple[re.Pattern[str], float]] = []
    for text in section.values:
        if not isinstance(text, str):
            raise config.bad(key, "has a key that is no string")
        value: float
        if key == "rank_pattern":
            value = section.integer(text, high=MAX_RANK)
        else:
            value = section.number(text, above=-1e-9)
        result.append((pattern(config.source, key, text), value))
    return result


def _first(patterns: list[tuple[re.Pattern[str], float]], module: str) -> float | None:
    """As PEFT: the first that matches decides."""
    return next((value for found, value in patterns if found.fullmatch(module)), None)


def _check_modules(
    config: Config, path: Path, modules: Collection[str], *, optional: bool
) -> tuple[str, ...]:
    """The names whose tensors must be here, as far as the model has such modules.

    optional: the config may name none.
    """
    targets = config.values.get("target_modules")
    if optional and not targets:
        check_targets(path, modules, ())
        return ()
    if isinstance(targets, list | tuple):
        if not targets or not all(isinstance(t, str) for t in targets) or len(targets) > 10_000:
            raise config.bad("target_modules", "must be a list of module names")
        check_targets(path, modules, targets)
        return () if config.values.get("exclude_modules") else tuple(targets)
    if not isinstance(targets, str):
        raise config.bad("target_modules", "must be a list or a string")
    return ()  # "all-linear" or a regular expression: the tensors say what it stood for


def _layers(config: Config) -> frozenset[int] | None:
    value = config.values.get("layers_to_transform")
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) > MAX_LAYERS or not all(type(n) is int and n >= 0 for n in numbers):
        raise config.bad("layers_to_transform", "must be a layer or a list of layers")
    return frozenset(numbers)
