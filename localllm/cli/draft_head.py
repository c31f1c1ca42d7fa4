"""`localllm finetune --method draft-head`: what it takes, what it shows."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from localllm.train.draft_config import DraftHeadConfig, DraftProgress
    from localllm.train.draft_head import DraftHeadReport

# What settings of a fine-tune mean here: by the name they have there, the one they have here.
_SETTINGS = {
    "model": "model",
    "out": "out",
    "data.source": "prompts",
    "data.seq_len": "max_tokens",
    "run.epochs": "epochs",
    "run.save_every": "save_every",
    "batch.size": "batch",
    "optimizer.lr": "learning_rate",
    "seed": "seed",
    "threads": "threads",
    "draft.tokens": "tokens",
    "draft.vocabulary": "vocabulary",
    "draft.inner": "inner",
    "draft.unroll": "unroll",
    "draft.held_out": "held_out",
    "draft.temperature": "temperature",
}
_LINES_EVERY = 15.0  # seconds, where no terminal shows a bar


class Stop:
    """Asked for by Ctrl-C, heeded after the step."""

    def __init__(self) -> None:
        self.asked = False

    def stop(self) -> None:
        self.asked = True


def train_draft_head_command(
    changes: Mapping[str, Any],
    *,
    run: str | None,
    resume: bool,
    unused: Mapping[str, bool],
    json_out: bool,
    interruptible: Callable[[Any], Any],
) -> None:
    """changes: the settings that were given. unused: other flags, whether they were given.

    interruptible: a context in which Ctrl-C calls `stop` of what it is given.
    """
    foreign = [name for name in changes if name not in _SETTINGS and name != "method.name"]
    foreign += [name for name, given in unused.items() if given]
    if foreign:
        raise typer.BadParameter(
            f"a draft head has no {', '.join(name.rpartition('.')[2] for name in foreign)}"
        )
    from localllm.train.draft_config import resumed_config
    from localllm.train.draft_head import train_draft_head

    config = (
        resumed_config(Path(run or changes.get("out") or _missing("--out")), changes.get("threads"))
        if resume
        else _config(changes)
    )
    stop = Stop()
    with interruptible(stop), _shown(json_out) as show:
        report = train_draft_head(config, show, should_stop=lambda: stop.asked)
    if report is None:
        print(
            f"\ninterrupted, and saved; go on with\n"
            f"  localllm finetune --method draft-head --out {config.out} --resume",
            file=sys.stderr,
        )
        raise typer.Exit(130)
    _tell(config, report, json_out)


def _config(changes: Mapping[str, Any]) -> DraftHeadConfig:
    from localllm.train.draft_config import DraftHeadConfig

    for name in ("model", "out"):
        if name not in changes:
            _missing(f"--{name}")
    values = {_SETTINGS[name]: value for name, value in changes.items() if name in _SETTINGS}
    for name in ("out", "prompts"):
        if name in values:
            values[name] = Path(values[name])
    return DraftHeadConfig(**values)


def _missing(flag: str) -> Any:
    raise typer.BadParameter(f"{flag} must be given")


def _tell(config: DraftHeadConfig, report: DraftHeadReport, json_out: bool) -> None:
    if json_out:
        print(json.dumps({**asdict(report), "type": "result", "folder": str(report.folder)}))
        return
    for line in report.lines():
        print(line)
    print(f"use it: localllm chat {config.model} --draft-head {report.folder}")


@contextmanager
def _shown(json_out: bool) -> Iterator[Callable[[DraftProgress], None]]:
    if json_out or not sys.stderr.isatty():
        yield _Lines(json_out)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(progress: DraftProgress) -> None:
            stage = progress.stage
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=progress.total)
            bars.update(tasks[stage], completed=progress.done, description=_words(progress))

        yield show


class _Lines:
    """A line when a stage begins or ends and now and then between; as JSON, if asked."""

    def __init__(self, json_out: bool) -> None:
        self._json = json_out
        self._stage = ""
        self._last = 0.0

    def __call__(self, progress: DraftProgress) -> None:
        new = progress.stage != self._stage
        due = time.monotonic() - self._last > _LINES_EVERY
        if not (new or due or progress.done == progress.total):
            return
        self._stage, self._last = progress.stage, time.monotonic()
        if self._json:
            print(json.dumps({"type": "progress", **asdict(progress)}), flush=True)
        else:
            print(
                f"{_words(progress)}: {progress.done:,} of {progress.total:,}",
                file=sys.stderr,
                flush=True,
            )


def _words(progress: DraftProgress) -> str:
    words: str = progress.stage
    if progress.loss is not None:
        words += f", loss {progress.loss:.3f}"
    if progress.agreed is not None and progress.agreed == progress.agreed:
        words += f", {progress.agreed:.2f} right in a row"
    return words
