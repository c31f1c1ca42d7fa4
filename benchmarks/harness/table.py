"""Tables in Markdown, and the comparisons that fill them."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import describe


@dataclass(frozen=True)
class Goal:
    """What a figure has to be: at least `value`, or below it."""

    value: float
    below: bool = False

    def reached(self, figure: float) -> bool:
        return (operator.lt if self.below else operator.ge)(figure, self.value)


def verdict(figure: float | None, goal: Goal | None) -> str:
    """yes, no, or a dash where there is nothing to judge."""
    if figure is None or goal is None:
        return "-"
    return "yes" if goal.reached(figure) else "no"


def wanted(goal: Goal | None, unit: str = "x") -> str:
    if goal is None:
        return "-"
    return f"{'<' if goal.below else '>='} {goal.value:g} {unit}".rstrip()


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up; numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    ruler = [f"{'-' * (width - 1)}{':' if i else '-'}" for i, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(header), line(ruler), *map(line, rows)])


def write_json(path: Path | None, rows: Sequence[Any], **more: Any) -> None:
    """The machine and every row (dataclasses) as JSON, if a path was given."""
    if path is not None:
        answer = {**describe(), **more, "rows": [asdict(row) for row in rows]}
        path.write_text(json.dumps(answer, indent=1) + "\n", "utf-8")
        print(f"wrote {path}")
