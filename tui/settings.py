"""settings.toml: how the app looks and behaves. Only what the user wants otherwise is in it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from localllm.errors import InvalidRequest
from localllm.files import replace_file

DEFAULT_MODEL = "smollm2:135m"
_STARTS = ("new", "resume")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Settings:
    """theme: one of Textual's, "ansi" for the terminal's own colours. plain: no borders and no
    animation, for screen readers. start: "new" or "resume". titles: the model names new chats.
    max_tokens: of an answer, where the chat does not say. editor: a command, "" for $EDITOR.
    """

    theme: str = "textual-dark"
    plain: bool = False
    vim: bool = False
    start: str = "new"
    sidebar: bool = True
    model: str = DEFAULT_MODEL
    system: str = ""
    titles: bool = True
    thinking_open: bool = False
    max_tokens: int = 2048
    editor: str = ""


def read_settings(path: Path) -> tuple[Settings, list[str]]:
    """The settings, and what is wrong with the file: a line it names keeps its default.

    A file that cannot be read at all gives the defaults and says why.
    """
    given, problems = read_toml(path)
    settings = Settings()
    for name, value in given.items():
        try:
            settings = with_setting(settings, name, value)
        except InvalidRequest as error:
            problems.append(f"{path}: {error}")
    return settings, problems


def with_setting(settings: Settings, name: str, value: Any) -> Settings:
    """Raises InvalidRequest for a setting that there is not, or a value it cannot have."""
    known = {field.name: type(getattr(Settings, field.name)) for field in fields(Settings)}
    if name not in known:
        raise InvalidRequest(f"there is no setting {name!r}; there are {', '.join(known)}")
    kind = known[name]
    # bool is a kind of int in Python, not in a settings file.
    if type(value) is not kind:
        told = {str: "a text in quotes", bool: "true or false", int: "a whole number"}[kind]
        raise InvalidRequest(f"{name} must be {told}, not {value!r}")
    if name == "start" and value not in _STARTS:
        raise InvalidRequest(f"start must be one of {', '.join(_STARTS)}, not {value!r}")
    if name == "max_tokens" and not 1 <= value <= 1_000_000:
        raise InvalidRequest(f"max_tokens must be between 1 and 1,000,000, not {value}")
    return replace(settings, **{name: value})


def write_settings(path: Path, settings: Settings) -> None:
    """Writes what differs from the defaults, whole or not at all. Raises OSError."""
    lines = [
        f"{field.name} = {_toml(value)}\n"
        for field in fields(Settings)
        if (value := getattr(settings, field.name)) != field.default
    ]
    write_private(path, "".join(lines))


def write_private(path: Path, text: str) -> None:
    """Whole or not at all, in a folder that is made if need be. Only its owner may read it.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    replace_file(path, [text.encode()], mode=0o600)


def read_toml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The file's content ({} without one), and why it could not be read."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            return {}, [f"{path} is larger than {_MOST_BYTES:,} bytes and was not read"]
        return tomllib.loads(data.decode()), []
    except FileNotFoundError:
        return {}, []
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        return {}, [f"{path} was not read: {error}"]


def _toml(value: object) -> str:
    # Of what settings hold, TOML and JSON write the same.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def describe(settings: Settings) -> Mapping[str, str]:
    return {field.name: _toml(getattr(settings, field.name)) for field in fields(settings)}
