"""Fine-tuning runs of the app: processes of their own that go on when the app is left.

LOCALLLM_HOME/jobs/NAME/
  job.json      the process, what it was started with, and where its run is
  log.txt       what it printed
  data.jsonl    what it learns from, where that came from the chats
The run itself is LOCALLLM_HOME/runs/NAME, as `localllm runs` knows it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from localllm.errors import InvalidRequest, StoreError
from localllm.hub.store import Store
from localllm.tui.learning import write_lines
from localllm.tui.settings import write_private

_JOB, _LOG, _DATA, _RUN = "job.json", "log.txt", "data.jsonl", "run.json"
_MOST_LINES = 200_000  # of metrics, kept in memory
_MOST_BYTES = 1 << 22  # read of a metrics file at a time
_TAIL = 2000  # characters of the log
COMMAND = (sys.executable, "-c", "from localllm.cli import main; main()", "finetune")


class Job:
    """A run that was started here. Reads its files anew whenever it is asked."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.name = folder.name
        self.folder = folder
        self._facts = dict(facts)
        self._lines: list[dict[str, Any]] = []
        self._read = 0
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def out(self) -> Path:
        """The run's folder, which becomes the adapter's."""
        return Path(str(self._facts["out"]))

    @property
    def command(self) -> list[str]:
        return [str(word) for word in self._facts.get("command", ())]

    def alive(self) -> bool:
        """Whether its process is there, and not another one that has its number now."""
        if self._child is not None and self._child.poll() is not None:
            return False  # a child of ours that ended is reaped by this
        pid = self._facts.get("pid")
        return isinstance(pid, int) and _began(pid) == self._facts.get("began")

    def status(self) -> str:
        """running; or how it ended: what the run itself says, "failed" or "killed"."""
        if self.alive():
            return "running"
        try:
            said = json.loads((self.out / _RUN).read_text("utf-8")).get("status")
        except (OSError, ValueError, AttributeError):
            return "failed"  # before there was a run
        return "killed" if said == "running" else str(said)

    def resumable(self) -> bool:
        """Whether it began and ended before its last step."""
        early = self.status() in ("interrupted", "killed", "failed")
        return early and (self.out / _RUN).is_file()

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far; one that is being written is left for later."""
        path = self.out / "metrics.jsonl"
        try:
            if path.stat().st_size < self._read:  # a resumed run cut what it does again
                self._lines.clear()
                self._read = 0
            with path.open("rb") as file:
                file.seek(self._read)
                new = file.read(_MOST_BYTES)
        except OSError:
            return self._lines
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                parsed = json.loads(line)
            except ValueError:
                continue
            if isinstance(parsed, dict):
                self._lines.append(parsed)
        del self._lines[:-_MOST_LINES]
        return self._lines

    def log_tail(self) -> str:
        """The end of what it printed, JSON events left out."""
        try:
            with (self.folder / _LOG).open("rb") as file:
                start = max(0, file.seek(0, os.SEEK_END) - 4 * _TAIL)
                file.seek(start)
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        if start:  # in the middle of a line
            text = text.partition("\n")[2]
        lines = [line for line in text.splitlines() if not line.startswith("{")]
        return "\n".join(lines)[-_TAIL:].strip()

    def adapter(self) -> Path | None:
        """The adapter's folder, None while there is none."""
        return self.out if (self.out / "adapter_config.json").is_file() else None

    def cancel(self) -> None:
        """Asks it to end after its step, saved. Nothing happens if it has ended."""
        if self.alive():
            os.kill(int(self._facts["pid"]), signal.SIGINT)


class Jobs:
    """home: LOCALLLM_HOME. command: what trains, options follow it."""

    def __init__(self, home: Path | None = None, command: Sequence[str] = COMMAND) -> None:
        self._home = home or Store().home
        self._command = tuple(command)
        self._known: dict[Path, Job] = {}

    def all(self) -> list[Job]:
        """The newest first. A folder that is damaged is left out."""
        found = []
        try:
            folders = list((self._home / "jobs").iterdir())
        except OSError:
            folders = []
        for folder in folders:
            job = self._known.get(folder)
            if job is None:
                try:
                    facts = json.loads((folder / _JOB).read_text("utf-8"))
                    job = self._known[folder] = Job(folder, {"out": facts["out"], **facts})
                except (OSError, ValueError, KeyError, TypeError):
                    continue
            found.append(job)
        return sorted(found, key=lambda job: float(job._facts.get("started", 0)), reverse=True)

    def resume(self, job: Job) -> None:
        """The run goes on where it was saved last.

        Raises InvalidRequest where it cannot, StoreError where nothing can be written."""
        if not job.resumable():
            raise InvalidRequest(f"{job.name} is {job.status()}: there is nothing to go on with")
        self._run(job, [*self._command, "--resume", str(job.out), "--json"])

    def start(
        self,
        data: Path | Iterable[Mapping[str, Any]],
        options: Mapping[str, str],
        more: Sequence[str] = (),
    ) -> Job:
        """data: a file, or lines to be written for it. options: of `localllm finetune`, without
        their dashes; more: others as they are typed.

        Raises InvalidRequest for no data, StoreError where nothing can be written.
        """
        if isinstance(data, Path) and not data.is_file():
            raise InvalidRequest(f"there is no file {data}", hint="name a file of examples")
        folder = self._new_folder(str(options.get("model", "run")))
        if not isinstance(data, Path):
            if not write_lines(folder / _DATA, data):
                raise InvalidRequest(
                    "there is nothing to learn from yet",
                    hint="rate answers, compare some, or write better ones",
                )
            data = folder / _DATA
        out = self._home / "runs" / folder.name
        words = [*self._command, "--data", str(data), "--out", str(out), "--json"]
        for name, value in options.items():
            words += [f"--{name}", value]
        words += more
        job = Job(folder, {"out": str(out), "command": words})
        self._run(job, words)
        self._known[folder] = job
        return job

    @staticmethod
    def _run(job: Job, words: Sequence[str]) -> None:
        """Begins a process for the job, and keeps which it is."""
        try:
            with (job.folder / _LOG).open("wb") as log:
                child = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # leaving the app or its terminal does not end it
                )
            job._child = child
            job._facts |= {"pid": child.pid, "began": _began(child.pid), "started": time.time()}
            write_private(job.folder / _JOB, json.dumps(job._facts, indent=1))
        except OSError as error:
            raise StoreError(f"the run cannot be started: {error}") from error

    def _new_folder(self, model: str) -> Path:
        """jobs/MODEL-DATE, with a number where that is taken already."""
        stem = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model).name).strip("-.")[:40] or "run"
        stem += time.strftime("-%Y%m%d-%H%M%S")
        for number in range(1, 1000):
            folder = self._home / "jobs" / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise StoreError(f"{folder} cannot be made: {error.strerror or error}") from error
            return folder
        raise StoreError(f"{self._home / 'jobs'} is full of runs named {stem}")


def _began(pid: int) -> str | None:
    """When a process began, as its system tells it; None if it is gone (or a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if fields[0] == "Z" else f"{boot} {fields[19]}"
    except (OSError, IndexError):
        if Path("/proc/self").exists():
            return None
    told = subprocess.run(
        ["ps", "-p", str(pid), "-o", "stat=,lstart="], capture_output=True, text=True, check=False
    ).stdout.split(maxsplit=1)
    return None if len(told) < 2 or told[0].startswith("Z") else told[1].strip()
