"""How fast it goes: tokens per second as they come, and the receipt of the last answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from textual.content import Content
from textual.widget import Widget

from localllm.tui.widgets.sparkline import spark


class Speed(Widget):
    """One line: the rate now, its course, and the time to the first token."""

    DEFAULT_CSS = "Speed { height: 1; width: 1fr; }"

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._line = Content("")

    def show(
        self, rate: float | None, course: Sequence[float], receipt: Mapping[str, Any] | None
    ) -> None:
        self._line = speed_line(rate, course, receipt)
        self.refresh()

    def render(self) -> Content:
        return self._line


def speed_line(
    rate: float | None, course: Sequence[float], receipt: Mapping[str, Any] | None
) -> Content:
    if rate is None and not receipt:
        return Content.styled("no answer yet", "dim")
    parts: list[Content | tuple[str, str]] = []
    if rate is None and receipt:
        rate = receipt.get("decode_tokens_per_second")
    if rate is not None:
        parts.append((f"{rate:.1f} tokens/s ", "bold"))
    if course:
        parts.append((spark(course, 24, low=0.0) + " ", "$primary"))
    first = (receipt or {}).get("time_to_first_token")
    if first is not None:
        parts.append((f"first token {seconds(first)}", "dim"))
    return Content.assemble(*parts)


def receipt_rows(receipt: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything a receipt tells, in words and units."""
    rate = {name: receipt.get(f"{name}_tokens_per_second") for name in ("prefill", "decode")}
    drafted, accepted = receipt.get("drafted_tokens", 0), receipt.get("accepted_tokens", 0)
    guessed = (
        f"{accepted} of {drafted} right ({accepted / drafted:.0%}), by {receipt.get('drafter')}"
        if drafted
        else "none"
    )
    adapter = receipt.get("adapter") or "none"
    seed = receipt.get("seed")
    rows = [
        ("ended by", str(receipt.get("stopped_by", "?"))),
        ("prompt", f"{receipt.get('prompt_tokens', 0):,} tokens"),
        ("cached", f"{receipt.get('cached_tokens', 0):,} tokens"),
        ("reuse ended", str(receipt.get("cache_stop", "?"))),
        ("answer", f"{receipt.get('generated_tokens', 0):,} tokens"),
        ("first token", _maybe(receipt.get("time_to_first_token"), seconds)),
        ("reading", _maybe(rate["prefill"], lambda value: f"{value:,.1f} tokens/s")),
        ("writing", _maybe(rate["decode"], lambda value: f"{value:,.1f} tokens/s")),
        ("in all", _maybe(receipt.get("total_time"), seconds)),
        ("waited", _maybe(receipt.get("queue_time"), seconds)),
        ("guesses", guessed),
        ("KV blocks", f"{receipt.get('peak_kv_blocks', 0)} at most"),
        ("preempted", f"{receipt.get('preemptions', 0)} times"),
        ("seed", "none: greedy" if seed is None else str(seed)),
        ("adapter", str(adapter)),
        ("backend", str(receipt.get("backend", "?"))),
    ]
    return [(name, value) for name, value in rows if value != "?"]


def seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {int(value % 60)} s"


def _maybe(value: Any, show: Any) -> str:
    return "not timed" if value is None else str(show(value))
