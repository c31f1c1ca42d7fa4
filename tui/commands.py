"""The one list of what the app can do.

Key bindings, the command palette, slash commands, the help screen and the footer are all made from
it. A module adds its commands with `register` when it is imported; `gather` imports them all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

# chat: the chat screen is on top. message: there, with a message chosen in the transcript.
# chats: there, with the list of chats focused. composer: there, while typing.
Where = Literal["everywhere", "chat", "message", "chats", "composer"]
Run = Callable[["ChatApp", str], "Awaitable[None] | None"]
Complete = Callable[["ChatApp", str], Sequence[str]]


@dataclass(frozen=True)
class Command:
    """Something the user can ask for.

    name: how keys.toml calls it, in words-with-hyphens. keys: as Textual names them ("ctrl+n").
    slash: typed after "/", None for none. argument: what may follow, for help ("[TITLE]").
    run: gets the app and what followed the slash command ("" from keys and palette).
    complete: what may follow, given its beginning.
    """

    name: str
    title: str
    help: str
    group: str
    run: Run
    keys: tuple[str, ...] = ()
    slash: str | None = None
    where: Where = "everywhere"
    shown_in_footer: bool = False
    argument: str = ""
    complete: Complete | None = None


COMMANDS: list[Command] = []
GROUPS = ("Chat", "Message", "Tree", "Chats", "Model", "Engine", "Learning", "Tools", "App")


def register(*commands: Command) -> None:
    """Adds commands; one of the same name takes the place of an earlier one.

    Two commands may share a key only where they can never meet (`where`), a slash never.
    """
    for command in commands:
        for place, other in enumerate(COMMANDS):
            if other.name == command.name:
                COMMANDS[place] = command
                break
        else:
            _check(command)
            COMMANDS.append(command)


def find(name: str) -> Command:
    """Raises KeyError for a name that no command has."""
    for command in COMMANDS:
        if command.name == name:
            return command
    raise KeyError(name)


def by_slash(word: str) -> Command | None:
    return next((command for command in COMMANDS if command.slash == word), None)


def grouped(commands: Iterable[Command] | None = None) -> list[tuple[str, list[Command]]]:
    """By group, in the order of GROUPS; others after them."""
    given = list(COMMANDS if commands is None else commands)
    names = [*GROUPS, *sorted({command.group for command in given} - set(GROUPS))]
    groups = [(name, [command for command in given if command.group == name]) for name in names]
    return [(name, found) for name, found in groups if found]


def gather() -> list[Command]:
    """Imports every module of `actions`, and returns all commands."""
    import localllm.tui.actions as actions

    for module in pkgutil.iter_modules(actions.__path__, f"{actions.__name__}."):
        importlib.import_module(module.name)
    return COMMANDS


def keys_of(command: Command, remapped: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The command's keys after the user's changes."""
    return remapped.get(command.name, command.keys)


def meet(one: Where, other: Where) -> bool:
    """Whether commands of these two places can be called at the same moment."""
    apart = {"message", "chats", "composer"}
    return one == other or not (one in apart and other in apart)


def _check(command: Command) -> None:
    for other in COMMANDS:
        assert command.slash is None or command.slash != other.slash, (
            f"/{command.slash} is taken by {other.name}"
        )
        shared = set(command.keys) & set(other.keys)
        assert not shared or not meet(command.where, other.where), (
            f"{', '.join(shared)} of {command.name} is taken by {other.name}"
        )
