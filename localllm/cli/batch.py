"""`localllm batch`: answer a file of requests, line by line, into another file."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localllm.cli import options

if TYPE_CHECKING:
    from types import FrameType

    from localllm.batch import BatchRun, Progress

_EVERY = 0.2  # seconds between two looks of the progress line


def batch(
    model: options.Model,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Requests, one JSON object a line.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Where the answers go.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew, whatever OUT holds.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Answer only the first so many lines.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests computed together.")] = 32,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: Annotated[
        int | None, typer.Option(help="Line i, from 0, is sampled with this seed + i.")
    ] = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    more: options.Set = None,
    adapter: options.Adapter = None,
    draft_model: options.DraftModel = None,
    draft_head: options.DraftHead = None,
    kv_disk: options.KvDisk = None,
    expert_memory: options.ExpertMemory = None,
    chat_template: options.ChatTemplate = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    context: options.Context = None,
    activations: options.Activations = None,
    kv_bits: options.KvBits = None,
    offline: options.Offline = False,
) -> None:
    """Answer a file of requests. Broken off, the same command goes on where it was."""
    template = options.read_template(chat_template)
    if not source.is_file():
        raise typer.BadParameter(f"{source} is no file")

    from localllm.batch import BatchRun
    from localllm.cli.loading import load_with_progress, tell_kv_disk

    llm = load_with_progress(
        model,
        backend=backend,
        threads=threads,
        context=context,
        max_batch=max_batch,
        activations=activations,
        kv_bits=kv_bits,
        chat_template=template,
        draft_model=draft_model,
        draft_head=draft_head,
        kv_disk=options.optional_bytes(kv_disk),
        expert_memory=options.optional_bytes(expert_memory),
        offline=offline or None,
    )
    with llm:
        used = None if adapter is None else llm.load_adapter(adapter)
        params = options.sampling_params(
            llm.default_params,
            more,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        shown = _ProgressLine()
        run = BatchRun(
            llm,
            source,
            target,
            params=params,
            adapter=used,
            max_batch=max_batch,
            limit=limit,
            overwrite=overwrite,
            on_progress=shown.update,
            say=shown.say,
        )
        with _interruptible(run):
            done = run.run()
        shown.clear()
    tell_kv_disk(llm)
    print(_summary(done, target), file=sys.stderr)
    if done.interrupted:
        print("  the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130)
    if done.failed:
        raise typer.Exit(1)


def _summary(done: Progress, target: Path) -> str:
    parts = [f"{done.lines} lines in {target}"]
    if done.resumed:
        parts.append(f"{done.resumed} of them from before")
    if done.failed:
        parts.append(f"{done.failed} failed")
    if done.new_tokens:
        parts.append(f"{done.new_tokens} new tokens, {_speed(done)}")
    return f"{'interrupted: ' if done.interrupted else ''}{', '.join(parts)}"


def _speed(done: Progress) -> str:
    return f"{done.new_tokens / done.seconds:.1f} tok/s" if done.seconds > 0 else "- tok/s"


class _ProgressLine:
    """One line on stderr that is written over; on anything but a terminal there is none."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next = 0.0
        self._width = 0

    def update(self, done: Progress) -> None:
        if not self._terminal or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVERY
        failed = f", {done.failed} failed" if done.failed else ""
        text = f"{done.lines} lines{failed}, {done.share:.0%} read, {_speed(done)}"
        print(f"\r{text:{self._width}}", end="", file=sys.stderr, flush=True)
        self._width = len(text)

    def say(self, text: str) -> None:
        self.clear()
        print(text, file=sys.stderr)

    def clear(self) -> None:
        if self._width:
            print(f"\r{'':{self._width}}\r", end="", file=sys.stderr, flush=True)
            self._width = 0


@contextmanager
def _interruptible(run: BatchRun) -> Iterator[None]:
    """The first Ctrl-C ends the run in good order; the second leaves at once."""

    def handle(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        run.cancel()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
