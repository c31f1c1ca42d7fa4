"""The list of chats. It holds pages of the store's list, not all of it, however long that is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.cache import LRUCache
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from localllm.tui.store import Chat
from localllm.tui.text import one_line

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

_PAGE = 100


class ChatList(ScrollView, can_focus=True):
    """One line a chat: pinned ones first, then the latest. `show` sets what is listed."""

    DEFAULT_CSS = """
    ChatList { height: 1fr; background: $surface; scrollbar-size-vertical: 1; }
    ChatList > .line--cursor { background: $primary-muted; color: $text; }
    ChatList:focus > .line--cursor { background: $primary; color: $text; text-style: bold; }
    ChatList > .line--open { color: $text-accent; text-style: bold; }
    ChatList > .line--muted { color: $text-muted; }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "line--cursor",
        "line--open",
        "line--muted",
        "line--chat",
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup,ctrl+b", "move(-10)", "Page up", show=False),
        Binding("pagedown", "move(10)", "Page down", show=False),
        Binding("home,g", "go(0)", "First", show=False),
        Binding("end,G", "go(-1)", "Last", show=False),
        Binding("enter,l", "open", "Open", show=False),
    ]

    @dataclass
    class Opened(Message):
        chat: int

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._count = 0
        self._filter: tuple[str, str | None, str | None] = ("", None, None)
        self._pages: LRUCache[int, list[Chat]] = LRUCache(16)
        self.cursor = 0
        self.open_chat: int | None = None
        self.waiting: set[int] = set()  # chats with an answer under way

    @property
    def chat_app(self) -> ChatApp:
        return self.app  # type: ignore[return-value]

    @property
    def chosen(self) -> Chat | None:
        return self._chat(self.cursor)

    @property
    def count(self) -> int:
        return self._count

    def show(self, words: str = "") -> None:
        """words: a part of titles, folder:NAME, #TAG; what they leave is listed."""
        self._filter = _parsed(words)
        self.cursor = 0
        self.reload()
        self.scroll_to(y=0, animate=False)

    def reload(self) -> None:
        """Reads it anew; the cursor stays on its chat if it can, while nobody moves it on the open
        one."""
        stays = self.open_chat
        if self.has_focus or stays is None:
            stays = None if self.chosen is None else self.chosen.id
        self._pages.clear()
        title, folder, tag = self._filter
        self._count = self.chat_app.store.count_chats(title=title, folder=folder, tag=tag)
        self.virtual_size = Size(1, self._count)
        for place, chat in enumerate(self._page(0)):
            if chat.id == stays:
                self.cursor = place
        self.cursor = max(0, min(self.cursor, self._count - 1))
        self.refresh()

    def action_move(self, by: int) -> None:
        self._go(self.cursor + by)

    def action_go(self, place: int) -> None:
        self._go(place if place >= 0 else self._count - 1)

    def action_open(self) -> None:
        if (chat := self.chosen) is not None:
            self.post_message(self.Opened(chat.id))

    def on_click(self, event: events.Click) -> None:
        place = int(event.y + self.scroll_offset.y)
        if 0 <= place < self._count:
            self._go(place)
            self.action_open()

    def _go(self, place: int) -> None:
        if self._count:
            self.cursor = max(0, min(place, self._count - 1))
            self.scroll_to_region(Region(0, self.cursor, 1, 1), animate=False)
            self.refresh()

    def _page(self, number: int) -> list[Chat]:
        found = self._pages.get(number)
        if found is None:
            title, folder, tag = self._filter
            found = self.chat_app.store.chats(
                limit=_PAGE, offset=number * _PAGE, title=title, folder=folder, tag=tag
            )
            self._pages[number] = found
        return found

    def _chat(self, place: int) -> Chat | None:
        if not 0 <= place < self._count:
            return None
        page = self._page(place // _PAGE)
        return page[place % _PAGE] if place % _PAGE < len(page) else None

    def render_line(self, y: int) -> Strip:
        place = y + int(self.scroll_offset.y)
        width = self.size.width
        base = self.rich_style
        chat = self._chat(place)
        if chat is None:
            text = " no chats yet" if not self._count and place == 0 else ""
            muted = self.get_component_rich_style("line--muted")
            return Strip([Segment(text, base + muted)]).adjust_cell_length(width, base)
        style = base
        if chat.id == self.open_chat:
            style += self.get_component_rich_style("line--open")
        muted = style + self.get_component_rich_style("line--muted")
        if place == self.cursor:
            style = base + self.get_component_rich_style("line--cursor")
            muted = style
        strip = Strip(_segments(chat, width, style, muted, chat.id in self.waiting))
        return strip.adjust_cell_length(width, style)


def _segments(chat: Chat, width: int, style: Style, muted: Style, waiting: bool) -> list[Segment]:
    mark = "…" if waiting else "★" if chat.pinned else " "
    age = ago(chat.updated)
    title = one_line(chat.title) or "New chat"
    folder = f"{one_line(chat.folder, 14)}/" if chat.folder else ""
    line = Strip([Segment(mark + " ", style), Segment(folder, muted), Segment(title, style)])
    room = max(1, width - len(age) - 2)
    cut = line.crop(0, room) if line.cell_length > room else line
    return [*cut.adjust_cell_length(room, style), Segment(f" {age} ", muted)]


def ago(then: float, now: float | None = None) -> str:
    """How long ago, in four characters at most."""
    seconds = max(0.0, (time.time() if now is None else now) - then)
    for length, unit in ((31557600, "y"), (604800, "w"), (86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return "now"


def _parsed(words: str) -> tuple[str, str | None, str | None]:
    title, folder, tag = [], None, None
    for word in words.split():
        if word.startswith("folder:"):
            folder = word.removeprefix("folder:")
        elif word.startswith("#") and len(word) > 1:
            tag = word[1:]
        else:
            title.append(word)
    return " ".join(title), folder, tag
