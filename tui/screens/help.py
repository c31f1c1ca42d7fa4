"""Every command with its keys, from the registry."""

from __future__ import annotations

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

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        self._show(event.value)

    def action_leave(self) -> None:
        self.dismiss(None)

    def _show(self, words: str) -> None:
        app: ChatApp = self.app  # type: ignore[assignment]
        self.query_one("#help-text", Static).update(help_text(app, words))


def help_text(app: ChatApp, words: str) -> Content:
    """The commands whose title, help or slash command hold all the words."""
    wanted = words.lower().split()
    parts: list[Content] = []
    for group, commands in grouped():
        found = [c for c in commands if all(word in _searched(c) for word in wanted)]
        if found:
            parts.append(Content.styled(f"{group}\n", "bold $text-primary"))
            parts += [_line(c, keys_of(c, app.remapped)) for c in found]
            parts.append(Content("\n"))
    if not wanted:
        parts.append(Content.styled("Typing\n", "bold $text-primary"))
        parts += [
            Content.assemble((f"  {keys:<22}", "$text-accent"), f"{what}\n")
            for keys, what in _TYPING
        ]
        keys = f'\nYour own keys go into {app.config / "keys.toml"}: name = "key".\n'
        parts.append(Content.styled(keys, "$text-muted"))
    return Content("").join(parts) if parts else Content.styled("no such command", "$text-muted")


def _searched(command: Command) -> str:
    return f"{command.title} {command.help} {command.slash} {command.name} {command.group}".lower()


def _line(command: Command, keys: tuple[str, ...]) -> Content:
    slash = f"/{command.slash} {command.argument}".rstrip() if command.slash else ""
    where = _WHERE.get(command.where, "")
    return Content.assemble(
        (f"  {', '.join(keys) or '-':<22}", "$text-accent"),
        (f"{slash:<26}", "$text-secondary"),
        f"{command.help}",
        (f" ({where})" if where and keys else "", "$text-muted"),
        (f"  {command.name}\n", "$text-disabled"),
    )


def show(app: ChatApp, argument: str) -> None:
    app.push_screen(HelpScreen())
