"""Runs a batch: keeps `max_batch` requests going, writes answers in the order of the input."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from localllm.batch.form import Fields, Form, PlainForm, read_object
from localllm.batch.journal import Journal
from localllm.batch.openai import OpenAIForm, is_openai
from localllm.batch.source import MAX_LINE_BYTES, Line, Source
from localllm.errors import InvalidRequest
from localllm.llm import LLM
from localllm.pump import InFlight
from localllm.results import GenerationResult
from localllm.sampling import SamplingParams

# Lines held at a time, for each request that runs: the others wait for one before them.
_WINDOW = 4
_SAMPLE = 1 << 16  # bytes at both ends of a weight file that tell it from others


@dataclass(frozen=True)
class Progress:
    """lines: finished and written, `resumed` of them by earlier runs. failed: of all of these.

    new_tokens and seconds: of this run. share: of the input's bytes that were read.
    """

    lines: int
    failed: int
    resumed: int
    new_tokens: int
    seconds: float
    share: float
    interrupted: bool = False


@dataclass
class _Pending:
    """A line on its way: `answer` is None while it runs."""

    line: Line
    form: Form
    answer: Fields | None = None
    failed: bool = False


class BatchRun:
    """One input file, answered line by line into one output file.

    A line's form is our own (`PlainForm`) or that of OpenAI's batch files (`OpenAIForm`), and so is
    its answer's. A line that is wrong or fails is answered by its error and stops nothing else.

    adapter: a loaded one's name, for all lines.
    params: for what lines leave out; None: the model's. With a seed, line i (from 0) gets seed + i.
    max_batch: requests under way together; give `LLM` the same.
    limit: only the first so many lines.
    overwrite: begin anew, whatever the output holds. Otherwise a run that was broken off goes on.
    on_progress: called about once a second, and when lines are finished.
    say: told what the user should know, one line each.

    At most 4 * max_batch lines are held in memory.
    Raises `InvalidRequest` if the output belongs to another input, model or other parameters.
    """

    def __init__(
        self,
        llm: LLM,
        source: Path,
        target: Path,
        *,
        params: SamplingParams | None = None,
        adapter: str | None = None,
        max_batch: int = 32,
        limit: int | None = None,
        overwrite: bool = False,
        on_progress: Callable[[Progress], None] = lambda _: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        if max_batch < 1:
            raise InvalidRequest(f"max_batch must be at least 1, not {max_batch}")
        self._llm = llm
        self._source = source
        self._target = target
        self._params = llm.default_params if params is None else params
        self._max_batch = max_batch
        self._limit = limit
        self._overwrite = overwrite
        self._on_progress = on_progress
        self._say = say
        self._cancelled = False
        self._told_model = False
        self._tokens = 0
        self._window: deque[_Pending] = deque()
        self._running: dict[int, _Pending] = {}
        self._adapter = adapter
        self._flight = llm.in_flight(adapter=adapter)

    def cancel(self) -> None:
        """From any thread or a signal handler: the run ends soon, and can be gone on with."""
        self._cancelled = True
        self._flight.cancel()

    def run(self) -> Progress:
        """Answers every line, and tells what was done. To be called once."""
        both = self._target.exists() and self._source.exists()
        if both and self._target.samefile(self._source):
            raise InvalidRequest(f"{self._target} is the input, and cannot be the output")
        started = time.monotonic()
        settings = _settings(self._llm, self._params, self._adapter)
        with (
            Source(self._source) as source,
            Journal(self._target, settings, overwrite=self._overwrite) as journal,
            self._flight as flight,
        ):
            lines = source.lines()
            resumed = journal.resume(line.hash for line in lines)
            todo = islice(lines, None if self._limit is None else max(0, self._limit - resumed))

            def progress() -> Progress:
                return Progress(
                    lines=journal.lines,
                    failed=journal.failed,
                    resumed=resumed,
                    new_tokens=self._tokens,
                    seconds=time.monotonic() - started,
                    share=source.position / source.size if source.size else 1.0,
                    interrupted=self._cancelled,
                )

            while True:
                more = self._fill(todo, flight)
                self._write(journal)
                journal.save_if_due()
                self._on_progress(progress())
                if len(flight) == 0 and (self._cancelled or not more):
                    break
                self._take(flight)
            journal.save()
            return progress()

    def _fill(self, todo: Iterator[Line], flight: InFlight) -> bool:
        """Submits lines until enough run; False once there are no more."""
        room = _WINDOW * self._max_batch
        while not self._cancelled and len(flight) < self._max_batch and len(self._window) < room:
            line = next(todo, None)
            if line is None:
                return False
            pending = _Pending(line, PlainForm(line.index, {}))
            self._window.append(pending)
            try:
                self._running[self._submit(pending, flight)] = pending
            except Exception as error:  # whatever is wrong with a line, the others go on
                self._fail(pending, error)
        return True

    def _submit(self, pending: _Pending, flight: InFlight) -> int:
        line = pending.line
        if line.text is None:
            raise InvalidRequest(f"the line is longer than {MAX_LINE_BYTES} bytes")
        given = read_object(line.text)
        if is_openai(given):
            pending.form = form = OpenAIForm(line.index, given)
            self._tell_model(form.named_model)
        else:
            pending.form = PlainForm(line.index, given)
        params = self._params
        if params.seed is not None:
            params = replace(params, seed=(params.seed + line.index) % 2**64)
        work = pending.form.work(self._llm, params)
        return flight.submit(work.prompt, work.params)

    def _take(self, flight: InFlight) -> None:
        if self._cancelled:
            flight.cancel()  # also what was just being submitted when it came
        for number, outcome in flight.finished(within=1.0):
            pending = self._running.pop(number)
            if isinstance(outcome, GenerationResult):
                self._tokens += outcome.receipt.generated_tokens
                if outcome.finish_reason != "cancelled":
                    pending.answer = pending.form.answer(self._llm, outcome)
            else:
                self._fail(pending, outcome)

    def _fail(self, pending: _Pending, error: Exception) -> None:
        pending.answer = pending.form.failure(error)
        pending.failed = True

    def _write(self, journal: Journal) -> None:
        while self._window and self._window[0].answer is not None:
            done = self._window.popleft()
            assert done.answer is not None
            journal.write(done.line.hash, done.answer, failed=done.failed)

    def _tell_model(self, named: str | None) -> None:
        own = self._llm.info.name
        if named is not None and named != own and not self._told_model:
            self._told_model = True
            self._say(f"lines name the model {named!r:.80}; {own} answers them")


def _settings(llm: LLM, params: SamplingParams, adapter: str | None) -> dict[str, Any]:
    """What decides the answers, besides the input and how the work is spread."""
    info = llm.info
    template = None if llm.tokenizer is None else llm.tokenizer.chat_template
    return {
        "model": _fingerprint(Path(info.path)),
        "adapter": None if adapter is None else llm.adapter_digest(adapter),
        "backend": info.backend,
        "activations": info.activations,
        "context": info.context,
        "chat template": hashlib.sha256((template or "").encode()).hexdigest()[:16],
        **json.loads(json.dumps({f: getattr(params, f) for f in params.__dataclass_fields__})),
    }


def _fingerprint(path: Path) -> str:
    """Tells a model's files from others by their names, sizes, beginnings and ends."""
    digest = hashlib.sha256()
    for file in sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE))
            stream.seek(max(0, size - _SAMPLE))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]
