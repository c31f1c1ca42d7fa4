"""A safetensors file written tensor by tensor, so that no more than one is in memory."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from localllm.errors import CheckpointError
from localllm.files import sync_folder

_NAMES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
}


@dataclass(frozen=True)
class Entry:
    """dtype: "F32", "F16", "BF16" or "U32"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(_NAMES[self.dtype].itemsize)


class SafetensorsWriter:
    """Use as a context: the file appears when it ends, or nothing does.

    Tensors come in the order of `entries`. Raises CheckpointError where they cannot be written.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self.path = path
        self._left = list(entries)[::-1]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for entry in entries:
            begin, end = end, end + entry.nbytes
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % 8)

    def __enter__(self) -> SafetensorsWriter:
        try:
            handle, self._part = tempfile.mkstemp(
                dir=self.path.parent, prefix=f".{self.path.name}."
            )
            self._file = os.fdopen(handle, "wb")
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written: {error.strerror or error}"
            ) from error
        self._put(len(self._header).to_bytes(8, "little") + self._header)
        return self

    def write(self, name: str, array: np.ndarray) -> None:
        entry = self._left.pop()
        kind = _NAMES[entry.dtype]
        assert (name, array.shape) == (entry.name, entry.shape), f"{name} is out of turn"
        assert array.dtype.itemsize == kind.itemsize, f"{name} is {array.dtype}, not {entry.dtype}"
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        self._put(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)

    def _put(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written: {error.strerror or error}"
            ) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                assert not self._left, f"{self._left[-1].name} was not written"
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                os.chmod(self._part, 0o644)
                os.replace(self._part, self.path)
                sync_folder(self.path.parent)
        except OSError as problem:
            raise CheckpointError(
                f"{self.path}: cannot be written: {problem.strerror or problem}"
            ) from problem
        finally:
            if os.path.exists(self._part):
                os.unlink(self._part)
