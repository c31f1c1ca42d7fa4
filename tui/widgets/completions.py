"""What a /command or @file that is being typed may become."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from localllm.tui.commands import COMMANDS, by_slash
from localllm.tui.text import one_line

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

_MOST = 50
_MOST_ENTRIES = 5000  # of a folder


@dataclass(frozen=True)
class Offer:
    """text: what takes the word's place. whole: nothing more is to be typed."""

    text: str
    shown: str
    note: str = ""
    whole: bool = True


class Completions(OptionList, can_focus=False):
    DEFAULT_CSS = """
    Completions {
        display: none; height: auto; max-height: 8; margin: 0 1; border: none;
        background: $panel; scrollbar-size-vertical: 1; padding: 0;
    }
    Completions.-open { display: block; }
    """

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, markup=False, compact=True)
        self._offers: list[Offer] = []
        self._word = ""

    @property
    def is_open(self) -> bool:
        return bool(self._offers)

    @property
    def offer(self) -> Offer | None:
        place = self.highlighted
        return None if place is None or not self._offers else self._offers[place]

    def follow(self, app: ChatApp, word: str) -> None:
        """Offers what this word may become. Does nothing where that was done already."""
        if word != self._word:
            self._word = word
            self.show(offers(app, word))

    def show(self, offers: Sequence[Offer]) -> None:
        if list(offers) == self._offers:
            return
        self._offers = list(offers)
        self.clear_options()
        self.add_options([Option(_line(offer)) for offer in offers])
        self.set_class(bool(offers), "-open")
        if offers:
            self.highlighted = 0

    def move(self, by: int) -> None:
        if self._offers:
            self.highlighted = ((self.highlighted or 0) + by) % len(self._offers)


def offers(app: ChatApp, word: str) -> list[Offer]:
    """For what is being typed; empty where nothing fits, or it is complete."""
    if word.startswith("/"):
        return _commands(app, word)
    return _files(word) if word.startswith("@") else []


def _commands(app: ChatApp, word: str) -> list[Offer]:
    name, space, argument = word[1:].partition(" ")
    if space:
        command = by_slash(name)
        if command is None or command.complete is None:
            return []
        found = command.complete(app, argument)
        return [
            Offer(f"/{name} {value}", one_line(value, 60)) for value in found if value != argument
        ][:_MOST]
    fitting = [c for c in COMMANDS if c.slash and c.slash.startswith(name)]
    if not fitting and len(name) > 1:
        fitting = [c for c in COMMANDS if c.slash and name in c.slash]
    fitting.sort(key=lambda command: command.slash or "")
    return [
        Offer(
            f"/{c.slash} " if c.argument else f"/{c.slash}",
            f"/{c.slash} {c.argument}".rstrip(),
            c.help,
            whole=not c.argument,
        )
        for c in fitting
        if f"/{c.slash}" != word or c.argument
    ][:_MOST]


def _files(word: str) -> list[Offer]:
    typed = word[1:].removeprefix('"')
    folder_part, _, beginning = typed.rpartition("/")
    folder = Path(os.path.expanduser(f"{folder_part}/" if folder_part or "/" in typed else "."))
    try:
        with os.scandir(folder) as entries:
            found = [
                (entry.name, entry.is_dir())
                for entry, _ in zip(entries, range(_MOST_ENTRIES), strict=False)
                if entry.name.lower().startswith(beginning.lower())
                and (beginning.startswith(".") or not entry.name.startswith("."))
            ]
    except OSError:
        return []
    found.sort(key=lambda one: (not one[1], one[0].lower()))
    offered = []
    for name, is_folder in found[:_MOST]:
        path = f"{folder_part}/{name}" if folder_part or "/" in typed else name
        if any(not character.isprintable() for character in path):
            continue
        quoted = any(character.isspace() for character in path)
        text = f'@"{path}' if quoted else f"@{path}"
        if is_folder:
            offered.append(Offer(f"{text}/", f"{name}/", "folder", whole=False))
        else:
            offered.append(Offer(text + ('" ' if quoted else " "), name))
    complete = [offer.text.rstrip() for offer in offered] == [word]  # Enter is to send it
    return [] if complete else offered


def _line(offer: Offer) -> Content:
    return Content.assemble(
        (one_line(offer.shown, 60), "bold"), ("  " + one_line(offer.note, 100), "$text-muted")
    )
