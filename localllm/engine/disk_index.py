"""What lies in a disk cache's folder, and in which order it goes."""

from __future__ import annotations

import contextlib
import heapq
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe in a block's place must not hold us
_PAGE = 4096  # file systems give space in pages
_SETTLED = 100_000_000  # ns; a folder that changed just now may change again in the same instant


class DiskIndex:
    """The blocks in the sub-folders, as last seen: digest -> file size and time of last use."""

    def __init__(self, folder: Path) -> None:
        self.total = 0
        self._folder = folder
        self._known: dict[bytes, tuple[int, int]] = {}  # digest -> file size, stamp (ns)
        self._by_age: list[tuple[int, bytes]] = []  # a heap; entries that `_known` belies are void
        self._members: list[set[bytes]] = [set() for _ in range(256)]
        self._seen: dict[int, int] = {}  # sub-folder -> its change time when scanned
        self._lock = threading.RLock()
        self._last_stamp = 0

    def __len__(self) -> int:
        return len(self._known)

    def path(self, digest: bytes) -> Path:
        assert len(digest) == 32
        name = digest.hex()
        return self._folder / name[:2] / f"{name}.kv"

    def size(self, digest: bytes) -> int | None:
        known = self._known.get(digest)
        return None if known is None else known[0]

    def use(self, digest: bytes, handle: int, size: int) -> None:
        """Marks the open file of a block as the most recently used, for every process to see."""
        with self._lock:
            stamp = self._stamp()
            self._put(digest, size, stamp)
        with contextlib.suppress(OSError):
            os.utime(handle, ns=(stamp, stamp))

    def refresh_use(self, digest: bytes, size: int) -> bool:
        """Marks a block as used if it is known and still there with this size."""
        if self.size(digest) != size:
            return False
        try:
            handle = os.open(self.path(digest), OPEN)
        except OSError:
            self.forget(digest)
            return False
        try:
            if os.fstat(handle).st_size != size:
                return False
            self.use(digest, handle, size)
            return True
        finally:
            os.close(handle)

    def forget(self, digest: bytes) -> None:
        with self._lock:
            size, _ = self._known.pop(digest, (0, 0))
            self.total -= pages(size)
            self._members[digest[0]].discard(digest)

    def refresh(self) -> None:
        """Scans the sub-folders that changed since they were last scanned."""
        with self._lock:
            present: dict[int, int] = {}
            with contextlib.suppress(OSError):
                for entry in os.scandir(self._folder):
                    if len(entry.name) == 2 and (name := _unhex(entry.name)):
                        with contextlib.suppress(OSError):
                            present[name[0]] = entry.stat().st_mtime_ns
            for first in self._seen.keys() - present.keys():
                del self._seen[first]
                for digest in list(self._members[first]):
                    self.forget(digest)
            for first, changed in present.items():
                if self._seen.get(first) != changed:
                    settled = time.time_ns() - changed > _SETTLED
                    self._scan(first)
                    self._seen[first] = changed if settled else -1

    def remove_oldest(self) -> bool:
        """Removes the block used longest ago; False if there is none that can be removed."""
        with self._lock:
            while self._by_age:
                stamp, digest = heapq.heappop(self._by_age)
                size, current = self._known.get(digest, (0, -1))
                if current != stamp:
                    continue
                path = self.path(digest)
                with contextlib.suppress(OSError):
                    used = path.stat().st_mtime_ns
                    if used > stamp:  # another process used it since
                        self._put(digest, size, used)
                        continue
                try:
                    path.unlink()
                except FileNotFoundError:
                    pass
                except OSError:
                    continue  # it stays, and counts, until the next scan
                self.forget(digest)
                return True
            return False

    def _scan(self, first: int) -> None:
        gone = set(self._members[first])
        for digest, size, stamp in _blocks_in(self._folder / f"{first:02x}"):
            gone.discard(digest)
            known = self._known.get(digest)
            if known is None or known[0] != size or known[1] < stamp:
                self._put(digest, size, stamp)
        for digest in gone:
            self.forget(digest)

    def _put(self, digest: bytes, size: int, stamp: int) -> None:
        before, _ = self._known.get(digest, (0, 0))
        self._known[digest] = (size, stamp)
        self._members[digest[0]].add(digest)
        self.total += pages(size) - pages(before)
        heapq.heappush(self._by_age, (stamp, digest))
        if len(self._by_age) > 2 * len(self._known) + 64:
            self._by_age = [(stamp, digest) for digest, (_, stamp) in self._known.items()]
            heapq.heapify(self._by_age)

    def _stamp(self) -> int:
        """Now in ns, later than every stamp before."""
        self._last_stamp = max(time.time_ns(), self._last_stamp + 1)
        return self._last_stamp


def _blocks_in(folder: Path) -> Iterator[tuple[bytes, int, int]]:
    """Digest, file size and time of last use of each file named like a block."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            name = entry.name.removesuffix(".kv")
            digest = _unhex(name) if len(name) == 64 and name != entry.name else None
            if digest is None or f"{digest[0]:02x}" != folder.name:
                continue
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    yield digest, status.st_size, status.st_mtime_ns


def pages(size: int) -> int:
    """Bytes that a file of this size takes on disk."""
    return -(-size // _PAGE) * _PAGE


def _unhex(name: str) -> bytes | None:
    """The bytes that a lower-case hexadecimal name spells, or None."""
    try:
        value = bytes.fromhex(name)
    except ValueError:
        return None
    return value if value.hex() == name else None
