"""Where messages are typed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from textual import events
from textual.message import Message
from textual.widgets import TextArea

from localllm.tui.text import plain
from localllm.tui.widgets.vim import Vim

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

_HISTORY = 200
_MOST_PASTED = 4_000_000  # characters


class Composer(TextArea):
    """Enter sends, Shift+Enter and Ctrl+J begin a line; up and down at its ends go through what was
    said before. Vim keys where the settings want them."""

    DEFAULT_CSS = """
    Composer {
        height: auto; min-height: 3; max-height: 14; border: round $primary 50%;
        background: $surface; padding: 0 1; scrollbar-size-vertical: 1;
    }
    Composer:focus { border: round $primary; }
    Composer.-editing { border: round $warning; }
    .-plain Composer, .-plain Composer:focus { border: none; min-height: 1; }
    """

    @dataclass
    class Sent(Message):
        text: str

    @dataclass
    class Typed(Message):
        """word: what the cursor is at the end of, if it may be completed: /… or @…; else ""."""

        word: str

    def __init__(self, id: str | None = None) -> None:
        super().__init__(
            id=id,
            soft_wrap=True,
            show_line_numbers=False,
            tab_behavior="focus",
            highlight_cursor_line=False,
            placeholder="Say something — / for commands, @ for a file",
        )
        self.said: list[str] = []
        self._back = 0  # how far back in the history; 0 is what is being typed
        self._typed = ""
        self.vim: Vim | None = None

    @property
    def chat_app(self) -> ChatApp:
        return self.app  # type: ignore[return-value]

    def on_mount(self) -> None:
        self.use_vim(self.chat_app.settings.vim)

    def use_vim(self, on: bool) -> None:
        self.vim = Vim(self) if on else None
        self.border_subtitle = "insert" if on else None

    # ---- its text

    def put(self, text: str) -> None:
        """Makes it the text, the cursor at its end; can be undone."""
        self.replace(plain(text), (0, 0), self.document.end)
        self.move_cursor(self.document.end)

    def sent(self, text: str) -> None:
        """Leaves what was typed since, and remembers the text."""
        self.put(self.text.removeprefix(text))
        if text.strip() and (not self.said or self.said[-1] != text):
            self.said.append(text)
            del self.said[:-_HISTORY]
        self._back = 0

    @property
    def word(self) -> str:
        """The /command or @file that the cursor is at the end of."""
        row, column = self.cursor_location
        before = self.document.get_line(row)[:column]
        if row == 0 and before.startswith("/"):
            return before
        at = before.rfind("@")
        if at < 0 or (at and not before[at - 1].isspace()):
            return ""
        word = before[at:]
        inner = word[1:]
        if inner.startswith('"'):
            return word if '"' not in inner[1:] else ""
        return word if not any(c.isspace() for c in inner) else ""

    def complete(self, text: str) -> None:
        """Puts `text` in the place of the word at the cursor."""
        row, column = self.cursor_location
        self.replace(text, (row, column - len(self.word)), (row, column))

    # ---- keys

    async def _on_key(self, event: events.Key) -> None:
        self.chat_app.typed = time.monotonic()
        if self.screen.completing(event):  # type: ignore[attr-defined]
            return
        if self.vim is not None and self.vim.took(event):
            event.stop()
            event.prevent_default()
            return
        if event.key == "enter":
            event.stop()
            event.prevent_default()
            self.send()
            return
        if event.key in ("shift+enter", "ctrl+j", "alt+enter"):
            event.stop()
            event.prevent_default()
            self.insert("\n")
            return
        if (event.key == "up" and self._go_back(1)) or (event.key == "down" and self._go_back(-1)):
            event.stop()
            event.prevent_default()
            return
        await super()._on_key(event)

    def send(self) -> None:
        self.post_message(self.Sent(self.text))

    def _go_back(self, by: int) -> bool:
        """Through the history, from the first or the last row only."""
        row, _ = self.cursor_location
        if (by > 0 and row > 0) or (by < 0 and row < self.document.line_count - 1):
            return False
        if by > 0 and not self._back and self.text and self.cursor_location != (0, 0):
            return False
        back = self._back + by
        if not 0 <= back <= len(self.said):
            return False
        if not self._back:
            self._typed = self.text
        self._back = back
        self.put(self.said[-back] if back else self._typed)
        if by > 0:
            self.move_cursor((0, 0))
        return True

    async def _on_paste(self, event: events.Paste) -> None:
        text = plain(event.text)
        if len(text) > _MOST_PASTED:
            self.chat_app.warn(f"only {_MOST_PASTED:,} of {len(text):,} characters were pasted")
            text = text[:_MOST_PASTED]
        event.prevent_default()
        event.stop()
        if result := self._replace_via_keyboard(text, *self.selection):
            self.move_cursor(result.end_location)

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        event.stop()
        self.post_message(self.Typed(self.word))
