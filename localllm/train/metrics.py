"""`metrics.jsonl`: what a run measured, a JSON object a line, exact across a resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from localllm.errors import StoreError

_MAX_LINE = 1 << 20


class MetricsFile:
    """Appended to as the run goes. A line is there, or it is not: the last one may be cut."""

    def __init__(self, path: Path, *, position: int = 0) -> None:
        """position: bytes that count; what a killed run wrote after its checkpoint is cut off."""
        self.path = path
        try:
            self._file = path.open("ab")
            self._file.truncate(min(position, self._file.tell()))
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error
        self.failed: str | None = None

    def write(self, line: Mapping[str, Any]) -> None:
        """A full disk costs lines, not the run; `failed` says so."""
        data = json.dumps(finite(line), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            self.failed = f"{self.path}: {error.strerror or error}"

    def position(self) -> int:
        """Bytes written, all of them on the disk when this returns."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self.failed = f"{self.path}: {error.strerror or error}"
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self.failed = f"{self.path}: {error.strerror or error}"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, one that a kill cut short left out."""
    try:
        with path.open("rb") as file:
            while line := file.readline(_MAX_LINE):
                try:
                    parsed = json.loads(line)
                except ValueError:
                    continue
                if isinstance(parsed, dict):
                    yield parsed
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error


def finite(value: Any) -> Any:
    """The same with NaN and infinities as None: JSON has no words for them."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
