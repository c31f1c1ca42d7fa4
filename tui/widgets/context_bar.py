"""How full the context is: what is cached, what is used, what is left, what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from textual.content import Content
from textual.widget import Widget


@dataclass(frozen=True)
class ContextUse:
    """Tokens. context: what the model was loaded with. cached: of the used ones, not computed
    again. reserve: what the answer may take at most. left_out: messages that would have to go.
    """

    used: int
    context: int
    cached: int = 0
    reserve: int = 0
    left_out: int = 0

    @property
    def free(self) -> int:
        return max(0, self.context - self.used)

    @property
    def over(self) -> int:
        return max(0, self.used - self.context)


class ContextBar(Widget):
    """A bar and a line of figures. Says before the fact what would not fit."""

    DEFAULT_CSS = """
    ContextBar { height: 2; width: 1fr; }
    ContextBar.-short { height: 1; }
    """

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._use: ContextUse | None = None

    def show(self, use: ContextUse | None) -> None:
        self._use = use
        self.tooltip = None if use is None else context_line(use, 200).plain
        self.refresh()

    @property
    def use(self) -> ContextUse | None:
        return self._use

    def render(self) -> Content:
        if self._use is None:
            return Content.styled("the context is measured when the model is loaded", "dim")
        width = self.size.width
        bar = context_cells(self._use, width)
        return bar if self.has_class("-short") else bar + "\n" + context_line(self._use, width)


def context_cells(use: ContextUse, width: int) -> Content:
    """`width` cells: cached, computed, kept for the answer, free; all red when it does not fit."""
    if use.over:
        return Content.styled("█" * width, "$error")
    whole = max(use.context, 1)

    def cells(tokens: int) -> int:
        return round(width * min(tokens, whole) / whole)

    cached = cells(use.cached)
    used = max(cells(use.used), 1 if use.used else 0)
    reserved = max(used, cells(use.used + use.reserve))
    return Content.assemble(
        ("█" * min(cached, used), "$success"),
        ("█" * max(0, used - cached), "$primary"),
        ("▒" * max(0, min(width, reserved) - used), "$warning"),
        ("░" * max(0, width - max(used, min(width, reserved))), "dim"),
    )


def context_line(use: ContextUse, width: int) -> Content:
    """The figures, as many as fit; what does not fit the context always does."""
    if use.over:
        text = f"{use.over:,} tokens over the context of {use.context:,}"
        if use.left_out:
            text += f": the oldest {use.left_out} messages would be left out"
        return Content.styled(text, "$text-error bold")
    parts = [f"{use.used:,} of {use.context:,} tokens"]
    if use.left_out:
        parts.append(f"{use.left_out} oldest messages left out")
    if use.reserve > use.free:
        parts.append(f"room for {use.free:,} of the {use.reserve:,} the answer may take")
    parts += [f"{use.cached:,} cached", f"{use.free:,} free"]
    text = parts[0]
    for part in parts[1:]:
        if len(text) + len(part) + 3 <= width or "oldest" in part or "room" in part:
            text += f" · {part}"
    style = "$text-warning" if use.reserve > use.free or use.left_out else "dim"
    return Content.styled(text, style)


def cache_story(receipt: Mapping[str, Any]) -> str:
    """What of the last prompt was not computed again, and why the reuse ended there."""
    prompt, cached = int(receipt.get("prompt_tokens", 0)), int(receipt.get("cached_tokens", 0))
    if not prompt:
        return "No answer yet."
    disk = int(receipt.get("cached_from_disk", 0))
    text = f"{cached:,} of {prompt:,} prompt tokens came from the cache ({cached / prompt:.0%})"
    if disk:
        text += f", {disk:,} of them from disk"
    why = str(receipt.get("cache_stop", "")).strip()
    return f"{text}. The reuse ended there because: {why}." if why else f"{text}."
