"""Full-text search over every message of every branch; a hit opens its branch at the message."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from localllm.errors import LocalLLMError
from localllm.tui.store import Hit
from localllm.tui.store.searcher import Searcher
from localllm.tui.text import one_line, plain
from localllm.tui.widgets.chat_list import ago
from localllm.tui.widgets.footer import KeyLine

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

_LIMIT = 100
_PAUSE = 0.08  # seconds of not typing before it searches
_ROLES = {"user": "you", "assistant": "model"}


class SearchScreen(Screen[Hit | None]):
    """The hit that was chosen, or None."""

    DEFAULT_CSS = """
    SearchScreen Input { border: none; height: 1; padding: 0 1; background: $boost; }
    SearchScreen OptionList { height: 1fr; border: none; background: $background; }
    SearchScreen #found { height: 1; padding: 0 1; color: $text-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Back"),
        Binding("down", "to_hits", "Hits", show=False),
        Binding("j", "move(1)", show=False),
        Binding("k", "move(-1)", show=False),
        Binding("slash", "to_words", "Words", show=False),
    ]

    def __init__(self, words: str = "") -> None:
        super().__init__()
        self._words = words
        self._hits: list[Hit] = []
        self._searching: asyncio.Task[None] | None = None
        self._searcher: Searcher | None = None

    def compose(self) -> ComposeResult:
        yield Input(self._words, placeholder="search all that was said", compact=True)
        yield Static("", id="found", markup=False)
        yield OptionList(markup=False)
        yield KeyLine()

    def on_mount(self) -> None:
        app: ChatApp = self.app  # type: ignore[assignment]
        self._searcher = Searcher(app.store)
        self.query_one(Input).focus()

    def on_unmount(self) -> None:
        if self._searching is not None:
            self._searching.cancel()
        if self._searcher is not None:
            self._searcher.close()

    @on(Input.Changed)
    def words_changed(self, event: Input.Changed) -> None:
        event.stop()
        if self._searching is not None:
            self._searching.cancel()
        self._searching = asyncio.create_task(self._search(event.value))

    async def _search(self, words: str) -> None:
        await asyncio.sleep(_PAUSE)
        assert self._searcher is not None
        try:
            self._hits = await self._searcher.search(words, _LIMIT)
        except LocalLLMError as error:
            app: ChatApp = self.app  # type: ignore[assignment]
            app.tell(error)
            return
        hits = self.query_one(OptionList)
        hits.clear_options()
        hits.add_options([Option(_shown(hit)) for hit in self._hits])
        if self._hits:
            hits.highlighted = 0
        count = f"{len(self._hits)}{'+' if len(self._hits) == _LIMIT else ''} messages"
        self.query_one("#found", Static).update(count if words.strip() else "")

    @on(Input.Submitted)
    async def submitted(self, event: Input.Submitted) -> None:
        event.stop()
        if self._searching is not None:
            await asyncio.wait([self._searching])
        place = self.query_one(OptionList).highlighted
        if self._hits:
            self.dismiss(self._hits[place or 0])

    @on(OptionList.OptionSelected)
    def selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss(self._hits[event.option_index])

    def action_to_hits(self) -> None:
        self.query_one(OptionList).focus()

    def action_to_words(self) -> None:
        self.query_one(Input).focus()

    def action_move(self, by: int) -> None:
        hits = self.query_one(OptionList)
        hits.action_cursor_down() if by > 0 else hits.action_cursor_up()

    def action_leave(self) -> None:
        self.dismiss(None)


def _shown(hit: Hit) -> Content:
    """Two lines: the chat, and the words found among those around them."""
    head = f"{one_line(hit.title, 60) or 'New chat'} · {_ROLES.get(hit.role, hit.role)}"
    parts: list[tuple[str, str] | str] = [
        (head, "bold"),
        (f" · {ago(hit.created)}\n  ", "$text-muted"),
    ]
    # The store marks words with \x02 and \x03; a message's own were never told apart from them, so
    # a stray one costs a highlight at most.
    for number, piece in enumerate(hit.excerpt.replace("\x03", "\x02").split("\x02")):
        text = " ".join(plain(piece).split("\n"))
        parts.append((text, "$text-accent bold") if number % 2 else text)
    return Content.assemble(*parts)


def search(app: ChatApp, argument: str) -> None:
    async def go() -> None:
        hit = await app.push_screen_wait(SearchScreen(argument))
        if hit is not None:
            app.show_chat_screen()
            await app.open_chat(hit.chat, hit.message)

    app.run_worker(go(), group="search")
