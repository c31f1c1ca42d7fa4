"""May this tool be called? Asked of the person, call by call."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalGroup, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from localllm.tui.text import plain

Approval = Literal["once", "always", "refuse"]
PAUSE = 0.7  # seconds without a key before a letter that answers
_MOST = 20_000  # characters of the arguments that are shown


class ApprovalScreen(ModalScreen[Approval]):
    """once: this call. always: every call of this tool in this chat. Escape refuses.

    It may open while somebody types, whose next letters must not answer: one that does counts
    after a pause only.

    source: where the tool is from, "built in" or an MCP server's name.
    """

    DEFAULT_CSS = """
    ApprovalScreen { align: center middle; }
    ApprovalScreen > VerticalGroup {
        width: 84; max-width: 96%; max-height: 90%; padding: 1 2;
        background: $surface; border: round $warning;
    }
    ApprovalScreen .head { text-style: bold; height: auto; }
    ApprovalScreen .note { color: $text-muted; height: auto; }
    ApprovalScreen VerticalScroll {
        height: auto; max-height: 16; margin: 1 0; padding: 0 1; background: $boost;
    }
    ApprovalScreen VerticalScroll Static { height: auto; }
    ApprovalScreen Horizontal { height: auto; align-horizontal: right; }
    ApprovalScreen Button { margin-left: 1; min-width: 10; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "answer('refuse')", "Refuse"),
        Binding("n", "letter('refuse')", "Refuse"),
        Binding("y", "letter('once')", "Allow once"),
        Binding("a", "letter('always')", "Always in this chat"),
    ]

    def __init__(
        self,
        tool: str,
        arguments: Mapping[str, Any],
        *,
        source: str = "built in",
        description: str = "",
    ) -> None:
        super().__init__()
        self._tool, self._arguments = tool, arguments
        self._source, self._description = source, description
        self._last = self._before = time.monotonic()  # the last keys, or when it opened

    def compose(self) -> ComposeResult:
        with VerticalGroup():
            yield Static(
                plain(f"The model wants to call {self._tool} ({self._source})"),
                classes="head",
                markup=False,
            )
            if self._description:
                yield Static(plain(self._description)[:400], classes="note", markup=False)
            with VerticalScroll():
                yield Static(shown_json(self._arguments), markup=False)
            with Horizontal():
                yield Button("Refuse", id="refuse", variant="error")
                yield Button("Always in this chat", id="always")
                yield Button("Allow once", id="once", variant="success")
            yield Static(
                "n refuses, a always allows it in this chat, y once", classes="note", markup=False
            )

    def on_mount(self) -> None:
        self._last = time.monotonic()
        # Enter pressed in haste must not allow anything.
        self.query_one("#refuse").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        answers: dict[str | None, Approval] = {"once": "once", "always": "always"}
        self.dismiss(answers.get(event.button.id, "refuse"))

    def on_key(self) -> None:
        """Before the key's binding is looked for."""
        self._before, self._last = self._last, time.monotonic()

    def action_answer(self, answer: Approval) -> None:
        self.dismiss(answer)

    def action_letter(self, answer: Approval) -> None:
        if self._last - self._before < PAUSE:
            self.notify("This came in the midst of typing; press it again to answer")
        else:
            self.dismiss(answer)


def shown_json(value: Any) -> str:
    """As JSON on several lines, its strings as text, bounded."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    text = plain(text)
    if len(text) > _MOST:
        return f"{text[:_MOST]}\n… and {len(text) - _MOST:,} characters more"
    return text
