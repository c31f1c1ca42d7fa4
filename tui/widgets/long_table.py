"""Tables of answers that would take a thousand widgets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from textwrap import wrap

from rich.cells import cell_len, set_cell_size
from textual.content import Content
from textual.widgets import Static

_WIDEST = 32  # characters in a line of a cell; what is longer goes on below
_BETWEEN = " │ "


class LongTable(Static):
    """All cells in one widget, as text."""

    DEFAULT_CSS = "LongTable { width: 1fr; height: auto; }"

    def __init__(self, headers: Sequence[Content], rows: Sequence[Sequence[Content]]) -> None:
        super().__init__(markup=False)
        self.show(headers, rows)

    def show(self, headers: Sequence[Content], rows: Sequence[Sequence[Content]]) -> None:
        first, *lines = as_lines(
            [cell.plain for cell in headers], [[cell.plain for cell in row] for row in rows]
        )
        rule = first.translate({ord(letter): "─" for letter in set(first) - {"│"}})
        rest = "\n".join([rule.replace("│", "┼"), *lines])
        self.update(Content.assemble((first + "\n", "bold $primary"), rest))


def as_lines(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Every line is as wide as the others; rows may have more cells than headers, or fewer."""
    count = max(map(len, (headers, *rows)))
    cut = [
        [wrap(cell, _WIDEST) or [""] for cell in (*row, *[""] * (count - len(row)))]
        for row in (headers, *rows)
    ]
    widths = [max(cell_len(line) for row in cut for line in row[at]) for at in range(count)]
    return [
        _BETWEEN.join(map(set_cell_size, parts, widths))
        for row in cut
        for parts in zip_longest(*row, fillvalue="")
    ]
