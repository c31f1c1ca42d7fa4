"""How a pull tells what it is doing. The command line draws bars; the default says nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called from the pulling thread; must be quick and must not raise."""

    def say(self, text: str) -> None:
        """One finished sentence for the user: a choice made, a wait, a source given up."""
        ...

    def update(self, label: str, done: int, total: int | None) -> None:
        """`done` bytes of `total` (None: unknown) of the step called `label`."""
        ...


class Silent:
    """Says nothing."""

    def say(self, text: str) -> None:
        pass

    def update(self, label: str, done: int, total: int | None) -> None:
        pass


def human_bytes(count: int) -> str:
    """94.2 MB, 1.6 GB … in powers of ten, as download sizes are stated."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size:.1f} PB"
