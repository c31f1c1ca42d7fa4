"""The KV cache, a cell a block: who holds it, how many, and what it is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

# One for each owner, again from the start when there are more; told apart by their letters too.
_COLOURS = (
    *("primary-lighten-2", "success", "warning", "error-lighten-2"),
    *("accent-lighten-2", "secondary-lighten-3"),
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
FREE, IDLE, SHARED = "·", "▫", "◆"


@dataclass(frozen=True)
class Block:
    """owners: the requests that hold it; refcount: how many do. name: the hash of everything its
    content depends on, "" while it is not full. group: of the KV cache (windowed layers have
    their own)."""

    number: int
    owners: tuple[int, ...] = ()
    refcount: int = 0
    name: str = ""
    group: int = 0

    @property
    def state(self) -> str:
        if self.refcount > 1:
            return "shared"
        return "in use" if self.refcount else "kept for reuse" if self.name else "free"


class KvMap(ScrollView, can_focus=True):
    """Arrow keys or the mouse choose a block; `Chosen` tells which."""

    DEFAULT_CSS = """
    KvMap { height: 1fr; min-height: 4; background: $surface; }
    KvMap:focus { background: $surface-lighten-1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(-1)", "Block before", show=False),
        Binding("right,l", "move(1)", "Next block", show=False),
        Binding("up,k", "row(-1)", "Up", show=False),
        Binding("down,j", "row(1)", "Down", show=False),
        Binding("home", "to(0)", "First block", show=False),
        Binding("end", "to(-1)", "Last block", show=False),
    ]

    class Chosen(Message):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.block = block

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._blocks: tuple[Block, ...] = ()
        self._order: dict[int, int] = {}  # owner -> its colour, by first appearance
        self._cursor = 0

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self._blocks

    @property
    def chosen(self) -> Block | None:
        return self._blocks[self._cursor] if self._blocks else None

    def show(self, blocks: Sequence[Block]) -> None:
        """The cursor stays on its block. An owner keeps its colour while it is there."""
        self._blocks = tuple(blocks)
        present = {owner for block in blocks for owner in block.owners}
        self._order = {owner: place for owner, place in self._order.items() if owner in present}
        for owner in sorted(present - self._order.keys()):
            taken = set(self._order.values())
            self._order[owner] = next(n for n in range(len(taken) + 1) if n not in taken)
        self._cursor = max(0, min(self._cursor, len(self._blocks) - 1))
        self._resize()
        self.refresh()

    def letter(self, owner: int) -> str:
        return _LETTERS[self._order.get(owner, 0) % len(_LETTERS)]

    def colour(self, owner: int) -> str:
        return _COLOURS[self._order.get(owner, 0) % len(_COLOURS)]

    def owners(self) -> list[int]:
        return list(self._order)

    @property
    def columns(self) -> int:
        """Cells of a line, a gap after every eighth."""
        width = max(self.scrollable_content_region.width, 9)
        return max(8, width * 8 // 9 // 8 * 8)

    def _resize(self) -> None:
        lines = -(-len(self._blocks) // self.columns)
        self.virtual_size = Size(self.scrollable_content_region.width, lines)

    def on_resize(self) -> None:
        self._resize()

    def render_line(self, y: int) -> Strip:
        line = y + self.scroll_offset.y
        base = self.rich_style
        start = line * self.columns
        segments = []
        for index in range(start, min(start + self.columns, len(self._blocks))):
            if index > start and (index - start) % 8 == 0:
                segments.append(Segment(" ", base))
            style = base + self._style(self._blocks[index])
            if index == self._cursor:
                style += Style(reverse=True, bold=True)
            segments.append(Segment(self._sign(self._blocks[index]), style))
        return Strip(segments).extend_cell_length(self.size.width, base)

    def _sign(self, block: Block) -> str:
        if block.refcount > 1:
            return SHARED
        if block.refcount:
            return self.letter(block.owners[0]) if block.owners else "■"
        return IDLE if block.name else FREE

    def _style(self, block: Block) -> Style:
        name = "foreground"
        if block.refcount:
            name = self.colour(block.owners[0]) if block.owners else "foreground"
        colour = self.app.theme_variables.get(name, "")
        try:
            style = Style.parse(colour) if colour else Style()
        except Exception:  # "ansi_default" and its like are no Rich colours
            style = Style()
        return style + Style(dim=not block.refcount, bold=bool(block.refcount))

    def action_move(self, by: int) -> None:
        self._go(self._cursor + by)

    def action_row(self, by: int) -> None:
        self._go(self._cursor + by * self.columns)

    def action_to(self, place: int) -> None:
        self._go(place % max(1, len(self._blocks)))

    def on_click(self, event: events.Click) -> None:
        cell = event.x - (event.x + 1) // 9
        if (event.x + 1) % 9 and cell < self.columns:
            self._go((event.y + self.scroll_offset.y) * self.columns + cell)

    def _go(self, place: int) -> None:
        if not 0 <= place < len(self._blocks):
            return
        self._cursor = place
        self.scroll_to_region(Region(0, place // self.columns, 1, 1), animate=False)
        self.refresh()
        self.post_message(self.Chosen(self._blocks[place]))
