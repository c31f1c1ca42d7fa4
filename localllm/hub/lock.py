"""Locks between processes that die with their holder, and unfinished files that tell they are."""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file_lock(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock at `path`; calls `on_wait` once if another holder must be waited for.

    The kernel drops a flock with its process, so a killed pull never blocks the next one. The
    file itself stays: removing it would let two processes hold locks on different inodes.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Like `file_lock`, but yields False at once when someone else holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def locked_part(folder: Path, *, mode: int = 0o666) -> tuple[int, Path]:
    """A new *.part file in `folder`, open and locked: its handle and path. Raises OSError."""
    while True:
        part = folder / f"{uuid.uuid4().hex}.part"
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_nlink:
                return handle, part
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # taken for abandoned in the moment before it was locked


def remove_abandoned(part: Path) -> None:
    """Removes an unfinished file that no living process has locked."""
    with contextlib.suppress(OSError):
        handle = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
        finally:
            os.close(handle)
