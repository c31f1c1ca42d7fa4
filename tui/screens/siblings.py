"""Messages that follow the same one, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import Screen
from textual.widgets import Static

from localllm.errors import InvalidRequest
from localllm.tui.actions.tree import chosen
from localllm.tui.store import Message
from localllm.tui.text import one_line, plain
from localllm.tui.widgets.footer import KeyLine
from localllm.tui.widgets.markdown import MOST_CHARACTERS, AnswerMarkdown

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

_MOST = 8


class Column(VerticalScroll, can_focus=True):
    """A sibling with what it took."""

    DEFAULT_CSS = """
    Column { width: 1fr; min-width: 34; height: 1fr; border: round $panel; padding: 0 1; }
    Column:focus { border: round $accent; }
    .-plain Column, .-plain Column:focus { border: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "scroll_down", show=False),
        Binding("k", "scroll_up", show=False),
    ]

    def __init__(self, message: Message, title: str, *, is_open: bool) -> None:
        super().__init__()
        self.message = message
        self.border_title = one_line(title, 30)
        self.border_subtitle = "open" if is_open else None

    def compose(self) -> ComposeResult:
        text = plain(self.message.content)
        if self.message.role == "assistant" and len(text) <= MOST_CHARACTERS:
            yield AnswerMarkdown(text)
        else:
            yield Static(text, markup=False)


class SiblingsScreen(Screen[int | None]):
    """The sibling that was chosen, or None. Left and right go from one to the next."""

    DEFAULT_CSS = """
    SiblingsScreen Horizontal { height: 1fr; overflow-x: auto; }
    SiblingsScreen #question { height: auto; max-height: 4; padding: 0 1; color: $text-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "leave", "Back"),
        Binding("left,h", "move(-1)", "Previous"),
        Binding("right,l", "move(1)", "Next"),
        Binding("enter", "choose", "Open this branch"),
    ]

    def __init__(self, message: Message, siblings: list[Message], question: str) -> None:
        super().__init__()
        self._message, self._siblings, self._question = message, siblings, question

    def compose(self) -> ComposeResult:
        yield Static(one_line(self._question, 300), id="question", markup=False)
        with Horizontal():
            for number, sibling in enumerate(self._siblings, 1):
                title = f"{number}/{len(self._siblings)} {sibling.model or ''}"
                if speed := sibling.params.get("temperature"):
                    title += f" · temperature {speed}"
                yield Column(sibling, title, is_open=sibling.id == self._message.id)
        yield KeyLine()

    def on_mount(self) -> None:
        for column in self.query(Column):
            if column.message.id == self._message.id:
                column.focus()

    def on_click(self, event: events.Click) -> None:
        if event.chain == 2:
            self.action_choose()

    def action_move(self, by: int) -> None:
        columns = list(self.query(Column))
        place = next((n for n, column in enumerate(columns) if column.has_focus_within), 0)
        columns[(place + by) % len(columns)].focus()

    def action_choose(self) -> None:
        for column in self.query(Column):
            if column.has_focus or column.has_focus_within:
                self.dismiss(column.message.id)

    def action_leave(self) -> None:
        self.dismiss(None)


def compare_siblings(app: ChatApp, message: Message) -> None:
    """Raises InvalidRequest for a message that has no siblings."""
    numbers = app.store.siblings(message.id)
    if len(numbers) < 2:
        raise InvalidRequest(
            "this message has no siblings to compare it with",
            hint="r gives another answer, e makes a branch",
        )
    siblings = [app.store.message(number) for number in numbers]
    if len(siblings) > _MOST:
        place = numbers.index(message.id)
        start = min(max(0, place - _MOST // 2), len(siblings) - _MOST)
        siblings = siblings[start : start + _MOST]
    question = "" if message.parent is None else app.store.message(message.parent).content

    async def go() -> None:
        number = await app.push_screen_wait(SiblingsScreen(message, siblings, question))
        if number is not None:
            app.show_chat_screen()
            await app.open_chat(message.chat, number)

    app.run_worker(go(), group="siblings")


def show(app: ChatApp, argument: str) -> None:
    compare_siblings(app, chosen(app, "assistant"))
