"""Reads the input of a batch line by line, with a bound on the memory that takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from localllm.errors import LocalLLMError

MAX_LINE_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """`index` counts the lines that hold something, from 0. `text` is None if it is too long."""

    index: int
    text: bytes | None
    hash: bytes


class Source:
    """The lines of a file that are not blank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
            self.size = path.stat().st_size
        except OSError as error:
            raise LocalLLMError(f"cannot read {path}: {error.strerror or error}") from error

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._file.tell() if self._file.seekable() else 0

    def lines(self) -> Iterator[Line]:
        index, first = 0, True
        while data := self._read(MAX_LINE_BYTES + 1):
            digest, whole = hashlib.sha256(), True
            while len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
                whole = False
                digest.update(data)
                data = self._read(MAX_LINE_BYTES + 1)
            if first:
                data, first = data.removeprefix(_BOM), False
            # The last line is the same with and without a newline behind it.
            text = data.strip()
            digest.update(text)
            if text or not whole:
                yield Line(index, text if whole else None, digest.digest())
                index += 1

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, size: int) -> bytes:
        try:
            return self._file.readline(size)
        except OSError as error:
            raise LocalLLMError(f"cannot read {self.path}: {error.strerror or error}") from error
