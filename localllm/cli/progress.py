"""Progress of a pull on stderr: a bar on a terminal, a line or two elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from localllm.hub.progress import Progress, human_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


@contextmanager
def pull_progress() -> Iterator[Progress]:
    """Nothing is shown, and rich is not imported, until there is something to show."""
    if not sys.stderr.isatty():
        yield PlainLines()
        return
    bars = Bars()
    try:
        yield bars
    finally:
        bars.close()


class PlainLines:
    """For logs and pipes: what is said, and once that a download has begun."""

    def __init__(self) -> None:
        self._begun = False

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def update(self, label: str, done: int, total: int | None) -> None:
        if not self._begun:
            self._begun = True
            self.say(label + (f" ({human_bytes(total)} in all)" if total else ""))


class Bars:
    """One bar a phase (downloading, unpacking), relabelled from file to file."""

    def __init__(self) -> None:
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None
        self._phase: tuple[str, int | None] | None = None

    def say(self, text: str) -> None:
        if self._bars is None:
            print(text, file=sys.stderr)
        else:
            self._bars.console.print(text, markup=False, highlight=False)

    def update(self, label: str, done: int, total: int | None) -> None:
        bars = self._open()
        phase = (label.partition(" ")[0], total)
        if self._task is None or phase != self._phase:
            self._phase = phase
            self._task = bars.add_task(label, total=total)
        bars.update(self._task, description=label, completed=done)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _open(self) -> RichProgress:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as RichProgress

            self._bars = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bars.start()
        return self._bars
