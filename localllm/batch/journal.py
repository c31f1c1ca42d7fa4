"""The output file of a batch, and the note beside it by which a broken-off run goes on.

OUT           finished lines, in input order
OUT.resume    how many of them are safe on the disk, and of which input, model and settings
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from localllm.errors import InvalidRequest, LocalLLMError

FORM = 1
_CHECKPOINT_LINES = 64
_CHECKPOINT_SECONDS = 1.0
_AGAIN = "give --overwrite to begin anew, or another output file"


class Journal:
    """Appends answers; knows what an earlier run finished.

    settings: what decides the answers besides the input; another run's must be the same.
    Raises `InvalidRequest` for an output of something else, `LocalLLMError` for one that cannot be
    written or that another process is writing.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        self.path = path
        self.note = path.with_name(f"{path.name}.resume")
        self.lines = 0
        self.failed = 0
        self._settings = dict(settings)
        self._input = hashlib.sha256()  # of the hashes of the finished input lines
        self._expected: str | None = None
        self._unsaved = 0
        self._saved_at = time.monotonic()
        self._file = _open_alone(path)
        try:
            with _telling(path):
                self._begin(overwrite)
        except BaseException:
            self._file.close()
            raise

    def resume(self, lines: Iterator[bytes]) -> int:
        """Takes the finished lines' hashes off the input's; how many those are."""
        for number in range(self.lines):
            line_hash = next(lines, None)
            if line_hash is None:
                raise InvalidRequest(
                    f"{self.path} holds {self.lines} answers, and the input has {number} lines",
                    hint=_AGAIN,
                )
            self._input.update(line_hash)
        if self._expected is not None and self._input.hexdigest() != self._expected:
            raise InvalidRequest(
                f"{self.path} belongs to another input: its first {self.lines} lines differ",
                hint=_AGAIN,
            )
        return self.lines

    def write(self, line_hash: bytes, answer: Mapping[str, Any], *, failed: bool) -> None:
        with _telling(self.path):
            self._file.write(_json_line(answer))
        self._input.update(line_hash)
        self.lines += 1
        self.failed += failed
        self._unsaved += 1
        if self._unsaved >= _CHECKPOINT_LINES:
            self.save()

    def save_if_due(self) -> None:
        if self._unsaved and time.monotonic() - self._saved_at >= _CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        """After this the lines written so far survive anything. The note never runs ahead."""
        with _telling(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            state = {
                "form": FORM,
                "settings": self._settings,
                "lines": self.lines,
                "failed": self.failed,
                "bytes": self._file.tell(),
                "input": self._input.hexdigest(),
            }
            part = self.note.with_name(f"{self.note.name}.part")
            with part.open("w", encoding="utf-8") as file:
                json.dump(state, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.note)
        self._unsaved = 0
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """Saves what is written, and lets others write. Idempotent."""
        try:
            if self._unsaved and not self._file.closed:
                self.save()
        finally:
            with contextlib.suppress(OSError):  # what could not be flushed was not promised
                self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except LocalLLMError:
            if error is None:
                raise

    def _begin(self, overwrite: bool) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if overwrite or size == 0:
            self._file.truncate(0)
            self.save()
            return
        state = self._read_note()
        differing = [
            name
            for name in {**self._settings, **state["settings"]}
            if self._settings.get(name) != state["settings"].get(name)
        ]
        if differing:
            raise InvalidRequest(
                f"{self.path} was begun with another {', '.join(sorted(differing))}", hint=_AGAIN
            )
        end = state["bytes"]
        if size < end or (end and os.pread(self._file.fileno(), 1, end - 1) != b"\n"):
            raise InvalidRequest(f"{self.path} was changed since it was written", hint=_AGAIN)
        self._file.truncate(end)  # drops lines that may be torn; they are computed again
        self._file.seek(end)
        self.lines, self.failed = state["lines"], state["failed"]
        self._expected = state["input"]

    def _read_note(self) -> dict[str, Any]:
        kinds = {"settings": dict, "lines": int, "failed": int, "bytes": int, "input": str}
        try:
            state = json.loads(self.note.read_text("utf-8"))
            if state["form"] == FORM and all(type(state[k]) is kind for k, kind in kinds.items()):
                return dict(state)
        except FileNotFoundError:
            raise InvalidRequest(
                f"{self.path} exists, and no {self.note.name} tells what it is", hint=_AGAIN
            ) from None
        except (ValueError, KeyError, TypeError):
            pass
        raise InvalidRequest(f"{self.note} cannot be understood", hint=_AGAIN)


def _open_alone(path: Path) -> BinaryIO:
    with _telling(path):
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise LocalLLMError(f"another process is writing {path}") from None
        return file


def _json_line(answer: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(answer, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in an id, for one
        return json.dumps(answer).encode() + b"\n"


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LocalLLMError(
            f"cannot write {error.filename or path}: {error.strerror or error}",
            hint="what was saved stays; the same command goes on from there",
        ) from error
