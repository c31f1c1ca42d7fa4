"""Every sampling parameter as a field of a form: its group, how it is typed, what it means.

What a value may be is decided by `SamplingParams` alone; here is only the way from text to value
and back. A chat keeps the fields that differ from the defaults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, get_args

from localllm.errors import InvalidRequest
from localllm.sampling.params import SamplingParams, Speculation

Kind = Literal["whole", "number", "flag", "choice", "texts", "ids", "mapping", "text"]
OFF = ""  # how None is typed

GROUPS: Mapping[str, Sequence[str]] = {
    "Length": ("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
    "Choice of tokens": (
        *("temperature", "top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "seed"),
        *("dynatemp_range", "dynatemp_exponent", "xtc_probability", "xtc_threshold"),
        *("mirostat", "mirostat_tau", "mirostat_eta", "logit_bias"),
    ),
    "Repetition": (
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_range"),
        "dry_sequence_breakers",
    ),
    "Form of the answer": ("json_schema", "json_object", "regex", "grammar", "choices"),
    "Several answers": ("n", "best_of", "beams", "length_penalty"),
    "Speed and report": ("speculation", "logprobs", "prompt_logprobs"),
}
_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("ignore_eos", "json_object"), "flag"),
    **dict.fromkeys(("stop", "dry_sequence_breakers", "choices"), "texts"),
    **dict.fromkeys(("regex", "grammar", "json_schema"), "text"),
    "stop_token_ids": "ids",
    "logit_bias": "mapping",
    "speculation": "choice",
    **dict.fromkeys(
        ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "mirostat"),
        "whole",
    ),
    **dict.fromkeys(("dry_allowed_length", "dry_range", "n", "best_of", "beams"), "whole"),
}


@dataclass(frozen=True)
class SamplingField:
    """options: what a choice is among. help: the parameter's own documentation."""

    name: str
    group: str
    kind: Kind
    default: Any
    help: str
    options: tuple[str, ...] = ()


@cache
def sampling_fields() -> tuple[SamplingField, ...]:
    """All of them, in the order of the form."""
    defaults = SamplingParams()
    groups = {name: group for group, names in GROUPS.items() for name in names}
    texts = _documentation(SamplingParams.__doc__ or "")
    known = {field.name for field in fields(SamplingParams)}
    assert known == groups.keys(), f"in no group: {known ^ groups.keys()}"
    return tuple(
        SamplingField(
            name,
            group,
            _KINDS.get(name, "number"),
            getattr(defaults, name),
            texts.get(name, ""),
            get_args(Speculation) if name == "speculation" else (),
        )
        for name, group in groups.items()
    )


def shown(field: SamplingField, value: Any) -> str:
    """As it is typed; a value of None is nothing typed."""
    if value is None:
        return OFF
    if field.kind in ("texts", "ids"):
        values = (value,) if isinstance(value, str) else value
        # No texts is nothing typed, but where nothing typed means the default's.
        return json.dumps(list(values), ensure_ascii=False) if values or field.default else OFF
    if field.kind == "mapping":
        return ", ".join(f"{key}={entry:g}" for key, entry in dict(value).items())
    if field.kind == "text":
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def parse(field: SamplingField, typed: str) -> Any:
    """The value that was typed. Raises InvalidRequest for what is none of the field's kind."""
    text = typed.strip()
    if text == OFF:
        # Nothing typed: None where that is a value, else the default.
        return None if field.default is None or field.name == "max_tokens" else field.default
    try:
        if field.kind == "whole":
            return int(text.replace("_", "").replace(",", ""))
        if field.kind == "number":
            return float(text)
        if field.kind in ("texts", "ids"):
            return _listed(field, text)
        if field.kind == "mapping":
            return _biases(text)
    except ValueError as error:
        wanted = {
            "whole": "a whole number",
            "number": "a number",
            "ids": "token ids, 1, 2 or [1, 2]",
            "texts": 'texts, one or ["one", "two"]',
            "mapping": "token=value, 17=-inf, 42=1.5",
        }[field.kind]
        raise InvalidRequest(f"{field.name} must be {wanted}, not {text!r:.60}") from error
    if field.kind == "flag":
        return text.lower() in ("true", "yes", "on", "1")
    return typed if field.kind == "text" else text


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """From what a chat keeps, which went through JSON. Raises InvalidRequest."""
    unknown = values.keys() - {field.name for field in sampling_fields()}
    if unknown:
        raise InvalidRequest(f"there is no sampling parameter {sorted(unknown)[0]!r:.60}")
    given = dict(values)
    if isinstance(given.get("logit_bias"), Mapping):
        # JSON has no whole numbers for keys.
        given["logit_bias"] = {_id(key): value for key, value in given["logit_bias"].items()}
    return SamplingParams(**given)


def to_keep(values: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The checked values that differ from the defaults (or from `base`), fit for JSON.

    Raises InvalidRequest, as SamplingParams does.
    """
    params = sampling_params(values)
    kept = {}
    for field in sampling_fields():
        value = getattr(params, field.name)
        usual = (base or {}).get(field.name, field.default)
        plain_value = _plain(value)
        if plain_value != _plain(usual):
            kept[field.name] = plain_value
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): entry for key, entry in value.items()}
    return list(value) if isinstance(value, tuple | list) else value


def _id(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _listed(field: SamplingField, text: str) -> list[Any]:
    if text.startswith("["):
        values = json.loads(text)
        if not isinstance(values, list):
            raise ValueError(text)
    elif field.kind == "ids":
        values = [part for part in re.split(r"[,\s]+", text) if part]
    else:
        values = [text]
    return [int(value) for value in values] if field.kind == "ids" else values


def _biases(text: str) -> dict[int, float]:
    pairs = (part.partition("=") for part in text.split(",") if part.strip())
    return {int(key): float(value) for key, _, value in pairs}


def _documentation(text: str) -> dict[str, str]:
    """`name, other: what they are` of a docstring, goings-on indented below, by name."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        start = re.match(r"    ((?:[a-z_]+)(?:, [a-z_]+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            found.update(dict.fromkeys(names, start[2]))
            # `n: …; best_of: …` on one line.
            for other, rest in re.findall(r"; ([a-z_]+): ([^;]*)", start[2]):
                found[other] = rest
        elif names and re.match(r"        \S", line):
            for name in names:
                found[name] += " " + line.strip()
        elif not line.strip():
            names = []
    return found
