"""Curves in a terminal: a line of bars, and a plot of braille dots with its axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from textual.content import Content
from textual.widget import Widget

BARS = "▁▂▃▄▅▆▇█"
_BLANK = 0x2800
# The bit of each of a braille cell's dots, by [row from the top][column].
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


@dataclass(frozen=True)
class Series:
    """Points of one curve. style: a Textual colour, `$primary` say."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: str = "$primary"


def spark(
    values: Sequence[float], width: int, *, low: float | None = None, high: float | None = None
) -> str:
    """The last `width` values as bars; low, high: the ends of the scale, else the values' own."""
    shown = [value for value in values if math.isfinite(value)][-width:] if width > 0 else []
    if not shown:
        return ""
    bottom = min(shown) if low is None else low
    span = (max(shown) if high is None else high) - bottom
    steps = len(BARS) - 1

    def bar(value: float) -> str:
        part = 0.5 if span <= 0 else (value - bottom) / span
        return BARS[min(steps, max(0, round(part * steps)))]

    return "".join(map(bar, shown))


def braille(
    points: Sequence[tuple[float, float]],
    width: int,
    height: int,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> list[str]:
    """A line through the points, `height` rows of `width` braille cells, the top row first.

    Neighbouring points are joined, so that a steep fall stays one curve.
    """
    columns, rows = width * 2, height * 4
    cells = [[_BLANK] * width for _ in range(height)]

    def place(x: float, y: float) -> tuple[int, int]:
        return (
            round(_share(x, x_range) * (columns - 1)),
            round((1 - _share(y, y_range)) * (rows - 1)),
        )

    before: tuple[int, int] | None = None
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            before = None
            continue
        here = place(x, y)
        for column, row in _line(before or here, here):
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
        before = here
    return ["".join(map(chr, row)) for row in cells]


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours, so that noise does not become a block."""
    if len(points) <= most:
        return list(points)
    result = []
    for index in range(most):
        group = points[len(points) * index // most : len(points) * (index + 1) // most]
        good = [point for point in group if math.isfinite(point[1])]
        if good:
            result.append((good[-1][0], sum(y for _, y in good) / len(good)))
    return result


class Plot(Widget):
    """Curves over a common x, with the ends of both axes written beside them."""

    DEFAULT_CSS = """
    Plot { height: 12; min-height: 4; color: $text; }
    """

    def __init__(
        self, *, x_name: str = "", id: str | None = None, classes: str | None = None
    ) -> None:
        super().__init__(id=id, classes=classes)
        self._series: tuple[Series, ...] = ()
        self._x_name = x_name

    def show(self, series: Sequence[Series]) -> None:
        self._series = tuple(series)
        self.refresh()

    @property
    def series(self) -> tuple[Series, ...]:
        return self._series

    def render(self) -> Content:
        return plotted(self._series, self.size.width, self.size.height, self._x_name)


def plotted(series: Sequence[Series], width: int, height: int, x_name: str = "") -> Content:
    """A plot as text of `height` lines, the last with the ends of the x axis and the names."""
    points = [
        point for one in series for point in one.points if all(math.isfinite(v) for v in point)
    ]
    if not points or width < 12 or height < 3:
        return Content("no points yet" if not points else "")
    x_range = (min(x for x, _ in points), max(x for x, _ in points))
    y_range = (min(y for _, y in points), max(y for _, y in points))
    marks = [_short(y_range[1]), _short(y_range[0])]
    margin = max(map(len, marks)) + 1
    inner, rows = width - margin, height - 1
    drawn = [
        (
            one.style,
            braille(thinned(one.points, inner * 2), inner, rows, x_range, y_range),
        )
        for one in series
    ]
    lines = []
    for row in range(rows):
        mark = marks[0] if row == 0 else marks[1] if row == rows - 1 else ""
        line = Content.styled(mark.rjust(margin - 1) + "│", "dim")
        for column in range(inner):
            # Where curves meet, dots of both in the colour of the later one.
            bits, style = 0, ""
            for colour, cells in drawn:
                bit = ord(cells[row][column]) - _BLANK
                if bit:
                    bits, style = bits | bit, colour
            line += Content.styled(chr(_BLANK + bits), style) if bits else Content(" ")
        lines.append(line)
    ends = f"{_short(x_range[0])}", f"{_short(x_range[1])}"
    foot = Content.styled(" " * margin + ends[0] + " ", "dim")
    for one in series:
        foot += Content.styled(f" ● {one.name}", one.style)
    tail = f"{x_name} {ends[1]}".strip()
    gap = width - foot.cell_length - len(tail)
    if gap > 0:
        foot += Content.styled(" " * gap + tail, "dim")
    return Content("\n").join([*lines, foot])


def _share(value: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return 0.5 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (
            start[0] + round((end[0] - start[0]) * step / steps),
            start[1] + round((end[1] - start[1]) * step / steps),
        )
        for step in range(steps + 1)
    ]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
