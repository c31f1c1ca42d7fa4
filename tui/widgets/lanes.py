"""The scheduler at work: a lane a request, a column a step, marked by what its rows were for."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from localllm.tui.trace import EngineTrace, Lane, Row, Step

LABEL = 26
_SIGNS = {"prefill": ("▓", "$warning"), "decode": ("▪", "$success"), "verify": ("3", "$accent")}
_NAMES = {"prefill": "prefill", "decode": "decode", "verify": "verify: guesses right, 0 to f"}


class Lanes(Widget):
    """The last steps, the newest at the right."""

    DEFAULT_CSS = "Lanes { height: auto; min-height: 6; width: 1fr; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._trace = EngineTrace()

    def show(self, trace: EngineTrace) -> None:
        self._trace = trace
        self.refresh(layout=True)

    def render(self) -> Content:
        return lanes(self._trace, self.size.width or self.app.size.width)


def lanes(trace: EngineTrace, width: int) -> Content:
    """Lines of requests over columns of steps; the last lines are the rows of each step."""
    if not trace.steps:
        return Content.styled("Nothing computed yet: ask something and watch.", "dim")
    label = min(LABEL, width // 3)
    steps = list(trace.steps)[-max(1, width - label - 1) :]
    seen = {row.request for step in steps for row in step.rows}
    shown = [lane for lane in trace.lanes.values() if lane.request in seen or not lane.ended]
    lines = [_line(lane, steps, label) for lane in shown]
    last = steps[-1]
    lines.append(Content.styled(_rows_of(steps, label), "dim"))
    lines.append(
        Content.assemble(
            *(
                part
                for name, (sign, style) in _SIGNS.items()
                for part in ((sign, style), (f" {_NAMES[name]}   ", "dim"))
            ),
            (
                f"step {last.number}: {sum(r.rows for r in last.rows)} rows in "
                f"{last.seconds * 1000:.1f} ms, {last.running} running, {last.waiting} waiting",
                "",
            ),
        )
    )
    return Content("\n").join(lines)


def _line(lane: Lane, steps: list[Step], label: int) -> Content:
    name = f"#{lane.request} {lane.state}"
    if lane.preemptions:
        name += f" ({lane.preemptions}x out)"
    style = "dim" if lane.ended else ""
    parts: list[tuple[str, str]] = [(name[: max(0, label - 1)].ljust(label), style)]
    for step in steps:
        row = next((row for row in step.rows if row.request == lane.request), None)
        parts.append((" ", "") if row is None else _sign(row))
    return Content.assemble(*parts)


def _sign(row: Row) -> tuple[str, str]:
    sign, style = _SIGNS.get(row.kind, ("?", ""))
    if row.kind == "verify":
        return f"{min(row.accepted, 15):x}", style if row.accepted else "$text-error"
    return sign, style


def _rows_of(steps: list[Step], label: int) -> str:
    """How many rows each step had, in bars by powers of two."""
    bars = " ▁▂▃▄▅▆▇█"
    heights = (min(8, sum(row.rows for row in step.rows).bit_length()) for step in steps)
    return "rows of the step".ljust(label)[:label] + "".join(bars[height] for height in heights)
