"""The bytes of one model file: opened once, mapped for views, read for copies."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import stat
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from localllm.errors import CheckpointError

# Touching one page of a map brings in its neighbours, up to a megabyte here and there: many small
# views would hold most of the file in memory.
_SMALL = 4 << 20


class WeightFile:
    """Raises `CheckpointError` if the path is no readable file, or plainly holds no weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # asked first: opening a pipe would wait
                raise CheckpointError(f"{path}: is not a regular file")
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror or error}") from error
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            _refuse_impostors(path, os.pread(self._file.fileno(), 64, 0))
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            self._file.close()
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        except BaseException:
            self._file.close()
            raise

    @property
    def map(self) -> mmap.mmap:
        """The whole file; pages are loaded when touched."""
        return self._map

    def read(self, offset: int, size: int) -> bytes:
        """A private copy; unlike a view it leaves no mapped pages behind."""
        try:
            data = os.pread(self._file.fileno(), size, offset)
            while len(data) < size:  # one call returns at most 2 GiB
                more = os.pread(self._file.fileno(), size - len(data), offset + len(data))
                if not more:
                    raise CheckpointError(f"{self.path}: became shorter while it was read")
                data += more
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read: {error.strerror or error}"
            ) from error
        return data

    def array(self, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """Read-only: a view into the map, or a copy of what is small or unaligned in the file."""
        count = math.prod(shape)
        nbytes = count * dtype.itemsize
        if nbytes < _SMALL or offset % dtype.itemsize:
            return np.frombuffer(self.read(offset, nbytes), dtype).reshape(shape)
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)

    def close(self) -> None:
        """Views handed out stay valid: the map lives as long as they do."""
        self._file.close()
        with contextlib.suppress(BufferError):
            self._map.close()


def _refuse_impostors(path: Path, head: bytes) -> None:
    """What a failed download leaves in place of weights."""
    if not head:
        raise CheckpointError(f"{path}: the file is empty", hint="Download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, not the weights themselves",
            hint="Run `git lfs pull` in the repository, or download the file itself.",
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path}: is a web page, not a model; the download was answered with an error page",
            hint="Download it again; the address may need a login.",
        )


def missing_tensor(path: Path, name: str, names: Iterable[str]) -> CheckpointError:
    """The error for a tensor that is not there, with the names that come close."""
    close = get_close_matches(name, list(names), n=3)
    known = f"; close names: {', '.join(close)}" if close else ""
    return CheckpointError(f"{path}: has no tensor '{name}'{known}")
