"""A rendered conversation in which control tokens cannot be confused with text that spells them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MARK = "\0"  # stands at the place of a control token; only `control` makes it one


@dataclass(frozen=True)
class Rendering:
    """text: a control token is one character of it, so that positions count both alike.

    control: the ids of control tokens by position. generated: (start, end) positions of what the
    template marks as the model's own ({% generation %} blocks).
    """

    text: str
    control: Mapping[int, int]
    generated: tuple[tuple[int, int], ...] = ()

    def runs(self, start: int = 0, end: int | None = None) -> list[str | int]:
        """Runs of plain text and ids of control tokens from `start` to `end`; none is empty."""
        stop = len(self.text) if end is None else end
        found: list[str | int] = []
        for at in sorted(at for at in self.control if start <= at < stop):
            if at > start:
                found.append(self.text[start:at])
            found.append(self.control[at])
            start = at + 1
        if start < stop:
            found.append(self.text[start:stop])
        return found

    def common(self, other: Rendering) -> int:
        """How many positions two renderings share at their beginning."""
        low, high = 0, min(len(self.text), len(other.text))
        while low < high:
            middle = (low + high + 1) // 2
            if self.text[low:middle] == other.text[low:middle]:
                low = middle
            else:
                high = middle - 1
        unlike = [at for at, _ in self.control.items() ^ other.control.items() if at < low]
        return min(unlike, default=low)

    def begins_with(self, other: Rendering) -> bool:
        return self.common(other) == len(other.text)


def rendering_of(
    runs: Sequence[str | int],
    spelled: Mapping[int, int],
    generated: Sequence[tuple[int, int]],
) -> Rendering:
    """From runs; `generated` counts characters of the text, `spelled` those of each token in it."""
    parts: list[str] = []
    control: dict[int, int] = {}
    before, after = [0], [0]  # positions with tokens spelled, and as one character each
    for run in runs:
        if isinstance(run, str):
            parts.append(run)
            length, width = len(run), len(run)
        else:
            control[after[-1]] = run
            parts.append(_MARK)
            length, width = spelled[run], 1
        before.append(before[-1] + length)
        after.append(after[-1] + width)

    def place(at: int) -> int:
        run = bisect_left(before, at)
        if before[run] == at or after[run] - after[run - 1] == 1:
            return after[run]
        return after[run - 1] + at - before[run - 1]

    spans = tuple((place(start), place(end)) for start, end in generated)
    return Rendering("".join(parts), control, spans)
