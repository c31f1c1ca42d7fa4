"""Curves of a run: in the terminal from braille dots, as PNG or SVG through matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from localllm.errors import InvalidRequest, StoreError

Points = Sequence[tuple[float, float]]
_HIGHEST = 1e300  # NaN, infinities and what overflows when subtracted are not drawn
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column of a cell


def braille(curves: Mapping[str, Points], *, width: int = 64, height: int = 12) -> list[str]:
    """One chart of all curves, as lines of text: labels, the frame and a legend included.

    width, height: of the drawing in characters, each of 2 x 4 dots.
    """
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(x) and abs(y) < _HIGHEST]
        for name, points in curves.items()
    }
    every = [point for points in finite.values() for point in points]
    if not every:
        return ["(nothing to plot yet)"]
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    if high == low:
        margin = max(0.5, abs(high) * 1e-6)
        low, high = low - margin, high + margin
    cells = [[0] * width for _ in range(height)]

    def column(x: float) -> int:
        return round((x - left) / (right - left or 1) * (2 * width - 1))

    def row(y: float) -> int:
        return round((high - y) / (high - low) * (4 * height - 1))

    for points in finite.values():
        before: tuple[int, int] | None = None
        for dot in _by_column([(column(x), row(y)) for x, y in points]):
            for x, y in _line(before or dot, dot):
                cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
            before = dot
    labels = [f"{high:.3f}", *[""] * (height - 2), f"{low:.3f}"][:height]
    wide = max(map(len, labels))
    lines = [
        f"{label:>{wide}} ┤{''.join(chr(0x2800 + bits) for bits in line)}"
        for label, line in zip(labels, cells, strict=True)
    ]
    ends = f"{left:g}", f"{right:g}"
    lines.append(f"{'':{wide}} └{'─' * width}")
    lines.append(f"{'':{wide}}  {ends[0]}{ends[1]:>{max(1, width - len(ends[0]))}}")
    names = [f"{name} {points[-1][1]:.4f}" for name, points in finite.items() if points]
    return [*lines, f"{'':{wide}}  {', '.join(names)}"]


def _by_column(dots: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Several values that fall into one column become their mean: a long run stays readable."""
    columns: dict[int, list[int]] = {}
    for x, y in dots:
        columns.setdefault(x, []).append(y)
    return [(x, round(sum(ys) / len(ys))) for x, ys in sorted(columns.items())]


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (
            round(start[0] + (end[0] - start[0]) * step / steps),
            round(start[1] + (end[1] - start[1]) * step / steps),
        )
        for step in range(steps + 1)
    ]


def save_plot(path: Path, curves: Mapping[str, Points], *, title: str) -> None:
    """Writes a PNG or SVG by the path's ending.

    Raises InvalidRequest for another ending and where matplotlib is missing, StoreError where the
    file cannot be written.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise InvalidRequest(f"{path} is neither .png nor .svg")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidRequest(
            "plots as files need matplotlib", hint="pip install 'localllm[plots]'"
        ) from error
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        xs, ys = [x for x, _ in points], [y for _, y in points]
        few = len(points) < 40
        axes.plot(xs, ys, label=name, linewidth=1.2, marker="o" if few else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error
