"""One message of the transcript."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from textual.app import ComposeResult
from textual.containers import VerticalGroup
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Collapsible, Static

from localllm.tui.answers import typed_of
from localllm.tui.store import Message
from localllm.tui.text import model_name, one_line, plain
from localllm.tui.widgets.markdown import MOST_CHARACTERS, AnswerMarkdown
from localllm.tui.widgets.one_layout import OneLayout
from localllm.tui.widgets.pace import OFTEN, PUT_OFF, TYPING, rest
from localllm.tui.widgets.tool_result import ToolResult

if TYPE_CHECKING:
    from localllm.tui.answers import Live
    from localllm.tui.app import ChatApp

_FOLDED_LINES = 24
_FOLDED_CHARACTERS = 4000
_WHO = {"user": "You", "assistant": "Model", "system": "System", "tool": "Tool"}
_ENDS = {
    "stopped": "stopped",
    "interrupted": "cut off: the app ended before it did",
    "failed": "failed",
}


class _Words(OneLayout, Static):
    pass


class MessageView(OneLayout, VerticalGroup, can_focus=True):
    """A message with who said it, its thinking (folded), its text, and how it ended.

    place: (number, count) among its siblings.
    """

    DEFAULT_CSS = """
    MessageView { padding: 0 1; margin: 0 0 1 0; border-left: outer transparent; }
    MessageView.user { border-left: outer $secondary 60%; }
    MessageView.assistant { border-left: outer $primary 40%; }
    MessageView:focus { border-left: outer $accent; background: $boost; }
    MessageView .who { color: $text-muted; height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
    MessageView.user .who { color: $text-secondary; }
    MessageView.assistant .who { color: $text-primary; }
    MessageView .end { color: $text-warning; display: none; }
    MessageView .end.-shown { display: block; }
    MessageView Collapsible { border: none; padding: 0; margin: 0 0 1 0; background: transparent; }
    MessageView Collapsible Contents { padding: 0 0 0 2; color: $text-muted; }
    .-plain MessageView, .-plain MessageView:focus { border-left: none; }
    """

    def __init__(self, message: Message, place: tuple[int, int] = (1, 1)) -> None:
        super().__init__(classes=message.role, id=f"message-{message.id}")
        self.message = message
        self.place = place
        self.unfolded = False
        self._live: Live | None = None
        self._text = ""
        self._thought = ""
        self._stream: Any = None
        self._drawing: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    @property
    def chat_app(self) -> ChatApp:
        return self.app  # type: ignore[return-value]

    def compose(self) -> ComposeResult:
        yield _Words(self._who(), classes="who", markup=False)
        if self.message.reasoning:
            yield self._thinking(self.message.reasoning)
        if self.message.role == "tool":
            yield self._result()
        elif self.message.role in ("assistant",) and len(self.message.content) <= MOST_CHARACTERS:
            yield AnswerMarkdown(plain(self.message.content))
        else:
            yield _Words(self._folded(), classes="body", markup=False)
        yield _Words("", classes="end", markup=False)

    def on_mount(self) -> None:
        if not self.query(".end"):
            return  # it is being removed already
        live = self._writing()
        if live is not None:
            self._follow(live)
        self._show_thinking()
        self._show_end()

    def on_unmount(self) -> None:
        if self._live is not None and self._on_piece in self._live.listeners:
            self._live.listeners.remove(self._on_piece)
        if self._drawing is not None:
            self._drawing.cancel()

    # ---- what it shows

    def change(self, message: Message, place: tuple[int, int]) -> None:
        """Shows the message as it is now. Does nothing where nothing changed."""
        if (message, place) == (self.message, self.place):
            return
        before, self.message, self.place = self.message, message, place
        if not self.is_mounted:
            return
        self.query_one(".who", Static).update(self._who(), layout=False)  # one line
        live = self._writing()
        if live is not None:
            if self._live is None:
                self._follow(live)
        elif message.role == "tool":
            for result in self.query(ToolResult):
                result.say(message.content, str(message.extra.get("state", "done")))
        elif self._live is None and message.content != before.content:
            self._set_text(message.content)
        self._show_end()

    def unfold(self) -> None:
        """Shows or hides what is long; of an answer its thinking."""
        folds = self.query(Collapsible)
        if folds:
            folds.first().collapsed = not folds.first().collapsed
        elif self.message.role != "assistant":
            self.unfolded = not self.unfolded
            self._set_text(self.message.content)

    def _who(self) -> Content:
        message = self.message
        who = _WHO.get(message.role, message.role)
        if message.role == "assistant" and message.model:
            who = one_line(model_name(message.model), 40)
        parts: list[Any] = [(who, "bold")]
        if self.place[1] > 1:
            parts.append((f"  ◂ {self.place[0]}/{self.place[1]} ▸", "$text-accent"))
        if message.role == "assistant" and "edited_from" in message.extra:
            parts.append(("  edited", "$text-muted"))
        if message.rating:
            parts.append(("  👍" if message.rating > 0 else "  👎", ""))
        if message.adapter:
            parts.append((f"  adapter {one_line(model_name(message.adapter), 32)}", "$text-muted"))
        if told := _cost(message):
            parts.append((f"  {told}", "$text-muted"))
        return Content.assemble(*parts)

    def _show_end(self) -> None:
        end = _ENDS.get(self.message.status, "")
        if error := self.message.extra.get("error"):
            end = f"{end}: {error}"
        elif self.message.receipt.get("stopped_by") in ("length", "max_tokens"):
            end = "reached its limit of new tokens; it can be continued"
        shown = self.query_one(".end", Static)
        shown.update(plain(f"[{end}]" if end else ""))
        shown.set_class(bool(end), "-shown")

    def _folded(self) -> str:
        """The text; of a long one its beginning, of one with files the person's own words."""
        message = self.message
        if self.unfolded:
            return plain(message.content)
        text = plain(typed_of(message.content, message.extra))
        lines = text[:_FOLDED_CHARACTERS].split("\n")[:_FOLDED_LINES]
        head = "\n".join(lines)
        if len(head) < len(text):
            head = f"{head}\n… {len(text) - len(head):,} more characters (o shows them)"
        for file in message.extra.get("attachments", ()):
            head += f"\nwith {one_line(str(file['name']), 60)}, {int(file['bytes']):,} bytes"
        return head

    def _thinking(self, text: str) -> Collapsible:
        body = _Words(plain(text), classes="thought", markup=False)
        opened = self.chat_app.settings.thinking_open
        title = _thinking_title(text)
        return Collapsible(body, title=title, collapsed=not opened, classes="thinking")

    def _result(self) -> ToolResult:
        message = self.message
        arguments = message.extra.get("arguments")
        return ToolResult(
            one_line(str(message.extra.get("tool") or message.extra.get("name", "tool")), 60),
            arguments if isinstance(arguments, dict) else {},
            message.content,
            state=str(message.extra.get("state", "done")),
        )

    def _set_text(self, text: str) -> None:
        if self.message.role == "assistant" and (found := self.query(AnswerMarkdown)):
            found.first().update(plain(text))
        elif bodies := self.query(".body"):
            bodies.first(Static).update(self._folded())

    # ---- while it is written

    def _writing(self) -> Live | None:
        return self.chat_app.answers.writing(self.message.chat, self.message.id)

    def _follow(self, live: Live) -> None:
        self._live = live
        live.listeners.append(self._on_piece)
        live.ended.append(self._on_end)
        self.add_class("-writing")
        # What came between the store's last write and now.
        self._text = live.text[len(self.message.content) :]
        self._thought = live.reasoning
        self._show_thinking()
        self._drawing = asyncio.create_task(self._draw())
        if self._text:
            self._news.set()

    def _on_piece(self, text: str, reasoning: str) -> None:
        self._text += text
        if reasoning:
            self._thought += reasoning
        self._news.set()

    def _on_end(self) -> None:
        live = self._live
        if live is None or not self.is_mounted:
            return
        self._live = None
        if self._on_piece in live.listeners:
            live.listeners.remove(self._on_piece)
        if self._drawing is not None:
            self._drawing.cancel()
        self.remove_class("-writing")
        self.run_worker(self._settle(live.text), exclusive=True, group="settle")

    async def _settle(self, text: str) -> None:
        """The whole text once more: what was drawn in pieces may differ from the whole."""
        if self._stream is not None:
            await self._stream.stop()
            self._stream = None
        if found := self.query(AnswerMarkdown):
            whole = plain(text)
            markdown = found.first()
            # Drawing it again moves the page; not where it has been drawn whole.
            if markdown.source != whole or "```" in whole or "|" in whole:
                await markdown.update(whole)
        self._show_thinking()

    async def _draw(self) -> None:
        """Draws what has come, a few times a second."""
        settled = False  # the page is, that the question and this answer came into
        while True:
            await self._news.wait()
            self._news.clear()
            began, worked = time.monotonic(), time.process_time()
            text, self._text = self._text, ""
            if text and (found := self.query(AnswerMarkdown)):
                if self._stream is None:
                    self._stream = AnswerMarkdown.get_stream(found.first())
                await self._stream.write(plain(text))
            self._show_thinking()
            await asyncio.sleep(OFTEN)  # meanwhile the page is laid out and painted
            if settled:
                await asyncio.sleep(rest(time.process_time() - worked, time.monotonic() - began))
            settled = True
            # A letter being typed must not wait for a page being drawn.
            drawn = time.monotonic()
            while drawn - self.chat_app.typed < TYPING and time.monotonic() - drawn < PUT_OFF:
                await asyncio.sleep(OFTEN / 2)

    def _show_thinking(self) -> None:
        if self._thought and not self.query(".thinking"):
            self.mount(self._thinking(self._thought), after=self.query_one(".who"))
            return
        for fold in self.query(".thinking").results(Collapsible):
            fold.display = bool(self._thought or self.message.reasoning)
            if self._thought:
                fold.title = _thinking_title(self._thought)
                if not fold.collapsed:
                    for shown in fold.query(".thought").results(Static):  # once it is mounted
                        shown.update(plain(self._thought))

    def on_collapsible_expanded(self, event: Collapsible.Expanded) -> None:
        event.stop()
        if isinstance(event.collapsible, ToolResult):
            return
        thought = self._thought or self.message.reasoning
        event.collapsible.query_one(".thought", Static).update(plain(thought))


def _thinking_title(text: str) -> str:
    words = len(text.split())
    return f"Thinking · {words:,} words"


def _cost(message: Message) -> str:
    receipt = message.receipt
    parts = []
    tokens = receipt.get("generated_tokens")
    if isinstance(tokens, int):
        parts.append(f"{tokens:,} tokens")
    speed = receipt.get("decode_tokens_per_second")
    if isinstance(speed, int | float):
        parts.append(f"{speed:.0f} tok/s")
    first = receipt.get("time_to_first_token")
    if isinstance(first, int | float):
        parts.append(f"first after {first:.2f} s")
    return " · ".join(parts)


def view_of(widget: Widget | None) -> MessageView | None:
    """The message that a widget is, or is within."""
    while widget is not None and not isinstance(widget, MessageView):
        parent = widget.parent
        widget = parent if isinstance(parent, Widget) else None
    return widget
