"""Guessed tokens of the last answer: which were right, which were not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from textual.content import Content

from localllm.tui.text import plain
from localllm.tui.widgets.sparkline import spark


@dataclass(frozen=True)
class Mark:
    """A token of an answer. fate: "own" (the model's), "accepted" (guessed and right) or
    "rejected" (guessed, wrong: not part of the answer)."""

    text: str
    fate: str = "own"


_STYLES = {
    "own": "",
    "accepted": "$text-success on $success-muted",
    "rejected": "$text-error on $error-muted strike",
}


def shaded(marks: Sequence[Mark]) -> Content:
    """The answer, its guessed tokens shaded; rejected ones struck where they were tried."""
    if not marks:
        return Content.styled("No answer whose tokens are known.", "dim")
    parts = [(_visible(mark), _STYLES.get(mark.fate, "")) for mark in marks]
    return Content.assemble(*parts)


def legend(marks: Sequence[Mark]) -> Content:
    counts = {fate: sum(1 for mark in marks if mark.fate == fate) for fate in _STYLES}
    return Content.assemble(
        (f" {counts['accepted']} guessed and right ", _STYLES["accepted"]),
        "  ",
        (f" {counts['rejected']} guessed and wrong ", _STYLES["rejected"]),
        (f"  {counts['own']} not guessed", "dim"),
    )


def acceptance_line(shares: Sequence[float], width: int) -> Content:
    if not shares:
        return Content.styled("no guesses in the last steps", "dim")
    mean = sum(shares) / len(shares)
    return Content.assemble(
        (f"accepted a step, mean {mean:.0%}  ", "dim"),
        (spark(shares, max(8, width - 32), low=0.0, high=1.0), "$success"),
    )


def _visible(mark: Mark) -> str:
    text = plain(mark.text)
    # A rejected line break would tear the answer apart.
    return text.replace("\n", "⏎") if mark.fate == "rejected" else text
