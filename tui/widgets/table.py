"""Tables whose cells are plain text, with vim's keys."""

from __future__ import annotations

from typing import Any, ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import DataTable

from localllm.tui.text import one_line


def cell(text: object, style: str = "") -> Text:
    """For tables, which would read markup in a bare string."""
    return Text(one_line(str(text), 400), style=style, no_wrap=True)


class Table(DataTable[Text]):
    """Rows are chosen as a whole. enter: what Enter does, as the footer says it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", "Down", show=False),
        Binding("k", "cursor_up", "Up", show=False),
        Binding("g", "scroll_top", "First", show=False),
        Binding("G", "scroll_bottom", "Last", show=False),
    ]

    def __init__(self, *columns: tuple[str, int | None], enter: str = "", id: str | None = None):
        """columns: headings and widths in cells; None: as wide as what is in it."""
        super().__init__(cursor_type="row", zebra_stripes=True, id=id)
        self._headings = columns
        if enter:
            self._bindings.key_to_bindings["enter"] = [
                Binding("enter", "select_cursor", enter, show=True)
            ]

    def on_mount(self) -> None:
        for name, width in self._headings:
            self.add_column(Text(name), width=width)

    @property
    def current(self) -> str | None:
        """The key of the row under the cursor."""
        if not self.row_count:
            return None
        return str(self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value)

    def fill(self, rows: list[tuple[str, tuple[Any, ...]]]) -> None:
        """Other rows, by key; the cursor stays on its row, or near it."""
        key, place = self.current, self.cursor_row
        self.clear()
        for name, cells in rows:
            self.add_row(*cells, key=name)
        names = [name for name, _ in rows]
        if names:
            place = names.index(key) if key in names else min(place, len(names) - 1)
            self.move_cursor(row=place, animate=False)
