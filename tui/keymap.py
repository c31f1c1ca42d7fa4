"""keys.toml: which keys call which command.

    new-chat = "ctrl+t"
    search = ["ctrl+f", "f3"]
    prune = []                # no key

A command's line takes the place of its default keys. What cannot be is told, and the default stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from localllm.tui.commands import Command, keys_of, meet
from localllm.tui.settings import read_toml

Remapped = Mapping[str, tuple[str, ...]]
_KEY = re.compile(r"(?:(?:ctrl|alt|shift|super|meta|hyper)\+)*(?:[a-z0-9_]+|\S)")
# Typing, leaving and moving about must stay possible.
KEPT = frozenset({"enter", "tab", "shift+tab", "backspace", "space", "up", "down", "left", "right"})
_NAMES = {"return": "enter", "esc": "escape", "del": "delete", "ins": "insert", "pgup": "pageup"}
_NAMES |= {"pgdn": "pagedown", "+": "plus", "-": "minus", "/": "slash", "?": "question_mark"}
_NAMES |= {"[": "left_square_bracket", "]": "right_square_bracket", ".": "full_stop", ",": "comma"}


def read_keys(path: Path, commands: Sequence[Command]) -> tuple[Remapped, list[str]]:
    """The user's keys by command name, and what is wrong with the file."""
    given, problems = read_toml(path)
    known = {command.name: command for command in commands}
    remapped: dict[str, tuple[str, ...]] = {}
    for name, value in given.items():
        if name not in known:
            problems.append(f"{path}: there is no command {name!r}; /keys lists them")
            continue
        keys = [value] if isinstance(value, str) else value
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            problems.append(f"{path}: {name} must be a key or a list of keys, not {value!r}")
            continue
        named = tuple(map(key_name, keys))
        bad = [key for key in named if not _KEY.fullmatch(key)]
        if bad or (where := _kept(named, known[name])):
            problems.append(
                f"{path}: {name}: {', '.join(bad)!r} is no key"
                if bad
                else f"{path}: {name}: {where} is needed for typing and moving about"
            )
            continue
        remapped[name] = named
    _without_clashes(path, remapped, commands, problems)
    return remapped, problems


def key_name(key: str) -> str:
    """A key as Textual calls it: lower case but for a single letter, modifiers in its order."""
    *modifiers, last = re.split(r"\+(?=.)", key.strip())
    last = _NAMES.get(last.lower(), last if len(last) == 1 else last.lower())
    order = ("ctrl", "alt", "shift", "super", "meta", "hyper")
    found = sorted({part.lower() for part in modifiers}, key=lambda m: (*order, m).index(m))
    if found and len(last) == 1:
        last = last.lower()
    return "+".join([*found, last])


def _kept(keys: Sequence[str], command: Command) -> str:
    return ", ".join(key for key in keys if key in KEPT and key not in command.keys)


def _without_clashes(
    path: Path,
    remapped: dict[str, tuple[str, ...]],
    commands: Sequence[Command],
    problems: list[str],
) -> None:
    """A key that two commands of the same place would share goes to neither newcomer."""
    again = True
    while again:
        again = False
        for command in commands:
            if command.name not in remapped:
                continue
            for other in commands:
                if other is command or not meet(command.where, other.where):
                    continue
                shared = set(remapped[command.name]) & set(keys_of(other, remapped))
                if shared:
                    problems.append(
                        f"{path}: {', '.join(sorted(shared))} of {command.name} is taken by "
                        f"{other.name}; {command.name} keeps its own keys"
                    )
                    del remapped[command.name]
                    again = True
                    break
