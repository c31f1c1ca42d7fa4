"""How a training run is shown: bars on a terminal, lines in a log, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from localllm.train.callbacks import Callback

_EVERY = 5.0  # seconds between two lines of a log


@contextmanager
def display(json_out: bool) -> Iterator[Callback]:
    """JSON lines on stdout; else text there, with bars on stderr if that is a terminal."""
    shown: Callback
    if json_out:
        shown = JsonLines()
    elif sys.stderr.isatty():
        shown = Bars()
    else:
        shown = Lines()
    try:
        yield shown
    finally:
        shown.close()


class JsonLines:
    """Each event as one JSON object a line, flushed at once."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        from localllm.train.metrics import finite

        told = {key: value for key, value in event.items() if key != "lines"}
        print(json.dumps(finite(told), ensure_ascii=False), flush=True)

    def close(self) -> None:
        pass


class Lines:
    """For pipes and logs: what is known before the first step, then a line now and then."""

    def __init__(self) -> None:
        self._next = 0.0

    def on_event(self, event: Mapping[str, Any]) -> None:
        if event["type"] == "step":
            now = time.monotonic()
            if now < self._next and event["step"] != event["steps"]:
                return
            self._next = now + _EVERY
        for line in described(event):
            self.say(line, error=event["type"] == "warning")

    def say(self, line: str, *, error: bool) -> None:
        print(line, file=sys.stderr if error else sys.stdout, flush=True)

    def close(self) -> None:
        pass


class Bars(Lines):
    """One bar that stays at the bottom: step, loss, speed, memory, time left."""

    def __init__(self) -> None:
        super().__init__()
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None
        self._valid = ""

    def on_event(self, event: Mapping[str, Any]) -> None:
        match event["type"]:
            case "start":
                self._open(event)
            case "step":
                self._update(event)
                return
            case "eval":
                self._valid = f" valid {event['loss']:.4f}"
            case "end":
                self.close()
        for line in described(event):
            self.say(line, error=False)

    def say(self, line: str, *, error: bool) -> None:
        if self._bars is None:
            print(line, file=sys.stderr if error else sys.stdout, flush=True)
        else:
            self._bars.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _open(self, event: Mapping[str, Any]) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[told]}", markup=False),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            expand=True,
        )
        self._task = self._bars.add_task(
            "", total=event["steps"], completed=event["step"], told="first step"
        )
        self._bars.start()

    def _update(self, event: Mapping[str, Any]) -> None:
        from localllm.hub.progress import human_bytes

        if self._bars is None or self._task is None:
            return
        memory = event.get("memory_bytes")
        told = f"loss {event['loss']:.4f}{self._valid}  {event['tokens_per_second']:,.0f} tok/s" + (
            f"  {human_bytes(memory)}" if memory else ""
        )
        self._bars.update(self._task, completed=event["step"], told=told)


def described(event: Mapping[str, Any]) -> Iterator[str]:
    """An event as lines of text; none for those that need no word."""
    match event["type"]:
        case "data":
            yield from event["lines"]
        case "program":
            beside = f": {event['note']}" if event["note"] else ""
            yield f"runs on the {event['name']} program{beside}"
            yield f"trains {event['trainable']:,} numbers" + (
                f" in {event['processes']} processes" if event["processes"] > 1 else ""
            )
        case "plan":
            yield ""
            yield from event["lines"]
            yield ""
        case "start":
            begun = f" from step {event['step']}" if event["step"] else ""
            yield f"{event['steps']:,} steps{begun}, {event['epoch_steps']:,} an epoch, in " + (
                str(event["folder"])
            )
        case "step":
            yield (
                f"step {event['step']}/{event['steps']}  loss {event['loss']:.4f}  "
                f"lr {event['lr']:.2e}  {event['tokens_per_second']:,.0f} tok/s"
            )
        case "eval":
            best = ", the best so far" if event["best"] else ""
            yield f"step {event['step']}: validation loss {event['loss']:.4f}{best}"
        case "samples":
            for answer in event["answers"]:
                yield f"step {event['step']} > {answer['prompt']}"
                yield f"  {answer['answer']}"
        case "warning":
            yield f"warning: {event['text']}"
        case "end":
            yield from _ended(event)


def _ended(event: Mapping[str, Any]) -> Iterator[str]:
    from localllm.hub.progress import human_bytes

    parts = [f"{event['status']} after step {event['step']}"]
    if event["loss"] is not None:
        parts.append(f"loss {event['loss']:.4f}")
    if event["best_loss"] is not None:
        parts.append(f"validation {event['best_loss']:.4f} at step {event['best_step']}")
    if event["seconds"]:
        parts.append(f"{event['tokens'] / event['seconds']:,.0f} tok/s")
    if event["peak_bytes"]:
        parts.append(f"{human_bytes(event['peak_bytes'])} at most")
    yield ", ".join(parts)
    if event["reason"] and event["status"] != "diverged":
        yield f"  {event['reason']}"
