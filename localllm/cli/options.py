"""Options that several commands share: how a model is loaded and how it is sampled."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localllm.cli.sizes import parse_bytes

if TYPE_CHECKING:
    from localllm import SamplingParams

Model = Annotated[
    str, typer.Argument(help="A catalog name, a path, hf:owner/repo[:file] or pypi:package.")
]
Backend = Annotated[str | None, typer.Option(help="Which backend runs the model.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
Activations = Annotated[
    str | None,
    typer.Option(help="int8, or float32: exact and slower. Unless told, the backend's own."),
]
KvBits = Annotated[
    int | None,
    typer.Option(
        metavar="16|8|4",
        help="Bits of the KV cache's numbers on the cpu backend, 16 unless told. Perplexity rises "
        "by 0.1 % at most with 8, by 5 to 11 % with 4.",
    ),
]
Context = Annotated[
    int | None, typer.Option(min=1, help="Positions to hold, prompt and answer together.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Never reach for the network.")]
System = Annotated[str | None, typer.Option(help="A system message.")]
ChatTemplate = Annotated[
    str | None, typer.Option(metavar="FILE", help="A Jinja file instead of the model's template.")
]
Reasoning = Annotated[
    str | None,
    typer.Option(
        metavar="off|on|low|medium|high",
        help="How much the model thinks before it answers, where its chat template can be told.",
    ),
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="New tokens at most; 512 unless told.")]
Temperature = Annotated[float | None, typer.Option(min=0, help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 is off.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this mass.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="1 is off.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="End the answer at this string; may be given again.")
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on when the model wants to stop.")
]

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other sampling parameter (docs/sampling.md): --set typical_p=0.9, --set n=4, "
        "--set json_schema=@FILE; may be given again.",
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(help="A smaller model of the same vocabulary that guesses ahead; same answers."),
]
DraftHead = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="A draft head for this model, for the same; `mtp` for the one that the model brings.",
    ),
]
Adapter = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="A LoRA adapter (PEFT or MLX-LM) to use.")
]
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for a mixture's experts, the others being read from disk as they are chosen: "
        "6GB. Unless told, all of them where that fits, else as much as fits.",
    ),
]
KvDisk = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Keep computed prompts on disk, so much at most: 4GB. Off unless told."
    ),
]

DEFAULT_MAX_TOKENS = 512


def sampling_params(
    defaults: SamplingParams, more: list[str] | None = None, **given: Any
) -> SamplingParams:
    """The model's recommended parameters, changed by the options that were given.

    more: what --set was given.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    changes.update(_assigned(text, defaults) for text in more or ())
    changes.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    return replace(defaults, **changes)


def assigned(more: list[str] | None) -> dict[str, Any]:
    """What --set was given, by name."""
    if not more:
        return {}
    from localllm import SamplingParams

    return dict(_assigned(text, SamplingParams()) for text in more)


def optional_bytes(size: str | None) -> int | None:
    return None if size is None else parse_bytes(size)


def _assigned(text: str, defaults: SamplingParams) -> tuple[str, Any]:
    """NAME=VALUE as a name and a value: JSON, @FILE for a file's text, or the text itself."""
    name, equals, value = text.partition("=")
    known = [field.name for field in fields(defaults)]
    if not equals or name not in known:
        raise typer.BadParameter(f"--set {text}: write NAME=VALUE, NAME one of {', '.join(known)}")
    if value.startswith("@"):
        return name, _read(value[1:])
    try:
        parsed = json.loads(value)
    except ValueError:
        return name, value
    if name == "logit_bias" and isinstance(parsed, dict):
        parsed = {int(key) if key.isdecimal() else key: bias for key, bias in parsed.items()}
    # A text that happens to be JSON stays a text where only a text can be meant.
    return name, value if name in ("regex", "grammar", "json_schema") else parsed


def read_template(path: str | None) -> str | None:
    """The template file's text; a missing or unreadable one is bad usage."""
    return None if path is None else _read(path)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from None
