"""The line under the transcript: the model, what the engine is at, speed and context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from textual.containers import HorizontalGroup
from textual.content import Content
from textual.widgets import Button, Static

from localllm.tui.text import model_name, one_line, plain

if TYPE_CHECKING:
    from localllm.tui.answers import Live, Said
    from localllm.tui.app import ChatApp
    from localllm.tui.engine.client import EngineState
    from localllm.tui.store import Message

_BAR = 8
_EVERY = 0.5  # seconds between two looks at an answer under way


class Status(Static):
    DEFAULT_CSS = """
    Status { height: 1; padding: 0 1; color: $text-muted; text-wrap: nowrap; }
    """

    def __init__(self, id: str | None = None) -> None:
        super().__init__("", id=id, markup=False)
        self.shown = ""
        self._used: int | None = None

    @property
    def chat_app(self) -> ChatApp:
        return self.app  # type: ignore[return-value]

    def on_mount(self) -> None:
        self.set_interval(_EVERY, self.look)
        self.look()

    def context_used(self, last: Message | None) -> None:
        """From the receipt of the open branch's last answer."""
        receipt = {} if last is None else last.receipt
        try:
            self._used = int(receipt["prompt_tokens"]) + int(receipt["generated_tokens"])
        except (KeyError, TypeError, ValueError):
            self._used = None
        self.look()

    def look(self) -> None:
        app = self.chat_app
        live = app.answers.live.get(app.chat_id or -1)
        parts = [_state(app.engine.state, app.answers.opened or app.model_name)]
        if live is not None:
            parts.append(_progress(live))
        context = getattr(app.engine.state.model, "context", None)
        if self._used is not None and context:
            share = min(1.0, self._used / context)
            filled = round(share * _BAR)
            bar = "" if app.settings.plain else "█" * filled + "░" * (_BAR - filled) + " "
            parts.append(f"{bar}{self._used:,}/{context:,} tokens")
        if chat := app.chat:
            if chat.adapter:
                parts.append(f"adapter {one_line(model_name(chat.adapter), 32)}")
            if chat.system:
                parts.append("system prompt")
        text = " · ".join(part for part in parts if part)
        if text != self.shown:
            self.shown = text
            self.update(Content(plain(text)), layout=False)  # it is one line always


def _state(state: EngineState, model: str) -> str:
    name = one_line(model_name(state.model.name if state.model else model), 40)
    match state.phase:
        case "ready":
            return name
        case "dead":
            return f"{name}: the engine has ended"
        case _:
            share = "" if state.fraction is None else f" {state.fraction:.0%}"
            doing = state.phase if state.detail in ("", model) else state.detail
            return f"{name}: {one_line(doing, 60)}{share}"


def _progress(live: Live) -> str:
    if live.waiting:
        return "waits for the model"
    if live.first is None:
        return "reading"
    return f"{live.speed:.1f} tok/s" if live.speed else "writing"


class Banner(HorizontalGroup):
    """Why there is no engine, and the way back."""

    DEFAULT_CSS = """
    Banner { display: none; height: auto; background: $error-muted; padding: 0 1; }
    Banner.-shown { display: block; layout: horizontal; }
    Banner Static { width: 1fr; color: $text-error; height: auto; }
    Banner Button { margin: 0 0 0 1; }
    """

    async def show(self, state: EngineState) -> None:
        """Its parts come when they are wanted: the first frame is drawn sooner without them."""
        dead = state.phase == "dead"
        self.set_class(dead, "-shown")
        if dead:
            text = state.error or "the engine has ended"
            if state.hint:
                text += f"\n{state.hint}"
            told = Static(plain(f"{text}\nYour chats are safe."), markup=False)
            button = Button("Restart", id="restart", variant="error", compact=True)
            await self.remove_children()
            await self.mount(told, button)


class Queue(Static):
    """What was said while an answer was under way, and waits."""

    DEFAULT_CSS = """
    Queue { display: none; height: auto; max-height: 4; padding: 0 1; color: $text-warning; }
    Queue.-shown { display: block; }
    """

    def __init__(self, id: str | None = None) -> None:
        super().__init__("", id=id, markup=False)
        self._lines: list[str] = []

    def show(self, waiting: Sequence[Said]) -> None:
        self.set_class(bool(waiting), "-shown")
        lines = [f"waits {n}: {one_line(said.typed, 200)}" for n, said in enumerate(waiting, 1)]
        if len(lines) > 3:
            lines[2:] = [f"… and {len(lines) - 2} more"]
        if lines:
            lines[-1] += "   (/unqueue takes the last back)"
        if lines != self._lines:
            self._lines = lines
            self.update("\n".join(lines))
