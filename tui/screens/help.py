"""Every command with its keys, from the registry."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Input, Static

from localllm.tui.commands import Command, grouped, keys_of
from localllm.tui.widgets.footer import KeyLine

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

_WHERE = {
    "message": "on a chosen message",
    "chats": "in the list of chats",
    "composer": "while typing",
}
_KEYS, _SLASH = 18, 13  # columns
_LEAST = 36  # for what a command does
_TYPING = (
    ("enter", "send"),
    ("shift+enter, ctrl+j", "a new line"),
    ("up, down", "what you said before, at the first and the last line"),
    ("/", "a command; Tab completes"),
    ("@", "a file whose text goes with the message; Tab completes"),
    ("tab, shift+tab", "to the next part of the screen, and back"),
)


class HelpScreen(Screen[None]):
    DEFAULT_CSS = """
    HelpScreen #help-find { border: none; height: 1; padding: 0 1; background: $boost; }
    HelpScreen VerticalScroll { padding: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "leave", "Back")]

    def compose(self) -> ComposeResult:
        yield Input(placeholder="find a command", id="help-find", compact=True)
        with VerticalScroll():
            yield Static(id="help-text", markup=False)
        yield KeyLine()

    def on_mount(self) -> None:
        self._show("")
        self.query_one(Input).focus()

    def on_resize(self) -> None:
        self._show(self.query_one(Input).value)

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        self._show(event.value)

    def action_leave(self) -> None:
        self.dismiss(None)

    def _show(self, words: str) -> None:
        app: ChatApp = self.app  # type: ignore[assignment]
        self.query_one("#help-text", Static).update(help_text(app, words, self.size.width - 4))


def help_text(app: ChatApp, words: str, width: int = 100) -> Content:
    """The commands whose title, help or slash command hold all the words."""
    wanted = words.lower().split()
    rows: list[tuple[str, list[tuple[str, str, str, str]]]] = []
    for group, commands in grouped():
        found = [c for c in commands if all(word in _searched(c) for word in wanted)]
        if found:
            rows.append((group, [_row(c, keys_of(c, app.remapped)) for c in found]))
    if not wanted:
        rows.append(("Typing", [(keys, "", what, "") for keys, what in _TYPING]))
    if not rows:
        return Content.styled("no such command", "$text-muted")
    parts: list[Content] = []
    for group, lines in rows:
        parts.append(Content.styled(f"{group}\n", "bold $text-primary"))
        parts += [_line(*line, width) for line in lines]
        parts.append(Content("\n"))
    if not wanted:
        own = f'Your own keys go into {app.config / "keys.toml"}, a line each: new-chat = "f10"\n'
        parts.append(Content.styled(own, "$text-muted"))
    return Content("").join(parts)


def _searched(command: Command) -> str:
    return f"{command.title} {command.help} {command.slash} {command.name} {command.group}".lower()


def _row(command: Command, keys: tuple[str, ...]) -> tuple[str, str, str, str]:
    slash = f"/{command.slash}" if command.slash else ""
    where = f" ({_WHERE[command.where]})" if command.where in _WHERE and keys else ""
    return ", ".join(keys), slash, command.help, f"{where}  {command.name}"


def _line(keys: str, slash: str, what: str, note: str, width: int) -> Content:
    """Keys and slash command in columns, the rest beside them; below them on a narrow screen."""
    head = f"  {keys:<{_KEYS}} {slash:<{_SLASH}} "
    room = width - len(head)
    if room < _LEAST:
        told = textwrap.wrap(what + note, max(10, width - 4)) or [""]
        rest = "\n    ".join(told)
        return Content.assemble(
            (f"  {keys}", "$text-accent"), (f"  {slash}\n", "$text-secondary"), f"    {rest}\n"
        )
    told = textwrap.wrap(what, room) or [""]
    beside = note if len(told[-1]) + len(note) <= room else ""
    rest = ("\n" + " " * len(head)).join(told)
    return Content.assemble(
        (f"  {keys:<{_KEYS}} ", "$text-accent"),
        (f"{slash:<{_SLASH}} ", "$text-secondary"),
        rest,
        (beside, "$text-muted"),
        "\n",
    )


def show(app: ChatApp, argument: str) -> None:
    app.push_screen(HelpScreen())
