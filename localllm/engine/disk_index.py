"""What lies in a disk cache's folder, and in which order it goes."""

from __future__ import annotations

import contextlib
import heapq
import os
import threading
import time
from pathlib import Path

OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe in a block's place must not hold us
_PAGE = 4096  # file systems give space in pages
_SETTLED = 50_000_000  # ns; a folder that changed just now may change again in the same instant
_SUBFOLDERS = {f"{first:02x}": first for first in range(256)}


class DiskIndex:
    """The blocks in the sub-folders, as last seen: digest -> file size and time of last use."""

    def __init__(self, folder: Path) -> None:
        self.total = 0
        self._folder = folder
        self._known: dict[bytes, tuple[int, int]] = {}  # digest -> file size, stamp (ns)
        self._by_age: list[tuple[int, bytes]] = []  # a heap; entries that `_known` belies are void
        self._names: list[set[str]] = [set() for _ in range(256)]  # of the known, by sub-folder
        self._seen: dict[int, int] = {}  # sub-folder -> its change time when scanned
        self._lock = threading.RLock()
        self._last_stamp = 0

    def __len__(self) -> int:
        return len(self._known)

    def path(self, digest: bytes) -> Path:
        assert len(digest) == 32
        return self._folder / f"{digest[0]:02x}" / _name(digest)

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
        """Marks a block as used if it is known and still there with this size. Raises OSError."""
        if self.size(digest) != size:
            return False
        try:
            handle = os.open(self.path(digest), OPEN)
        except FileNotFoundError:
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
            self._names[digest[0]].discard(_name(digest))

    def refresh(self) -> None:
        """Scans the sub-folders that changed since they were last scanned.

        Raises OSError where it cannot look; then nothing is forgotten, as it may still take room.
        """
        with self._lock:
            present: dict[int, int] = {}
            for entry in _listed(self._folder):
                first = _SUBFOLDERS.get(entry.name)
                if first is not None:
                    present[first] = entry.stat().st_mtime_ns
            for first in self._seen.keys() - present.keys():
                del self._seen[first]
                self._forget_names(set(self._names[first]))
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
        """Looks at what is new there. A known block does not change but for its time of use."""
        known = self._names[first]
        there: set[str] = set()
        for entry in _listed(self._folder / f"{first:02x}"):
            there.add(entry.name)
            digest = None if entry.name in known else _digest(entry.name)
            if digest is None or digest[0] != first:
                continue
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    self._put(digest, status.st_size, status.st_mtime_ns)
        self._forget_names(known - there)

    def _forget_names(self, names: set[str]) -> None:
        for name in names:
            digest = _digest(name)
            assert digest is not None
            self.forget(digest)

    def _put(self, digest: bytes, size: int, stamp: int) -> None:
        before, _ = self._known.get(digest, (0, 0))
        self._known[digest] = (size, stamp)
        self._names[digest[0]].add(_name(digest))
        self.total += pages(size) - pages(before)
        heapq.heappush(self._by_age, (stamp, digest))
        if len(self._by_age) > 2 * len(self._known) + 64:
            self._by_age = [(stamp, digest) for digest, (_, stamp) in self._known.items()]
            heapq.heapify(self._by_age)

    def _stamp(self) -> int:
        """Now in ns, later than every stamp before."""
        self._last_stamp = max(time.time_ns(), self._last_stamp + 1)
        return self._last_stamp


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder; a missing one is empty. Raises OSError."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _name(digest: bytes) -> str:
    return f"{digest.hex()}.kv"


def _digest(name: str) -> bytes | None:
    """The digest that a block's file name spells, or None."""
    try:
        digest = bytes.fromhex(name.removesuffix(".kv"))
    except ValueError:
        return None
    return digest if len(digest) == 32 and _name(digest) == name else None


def pages(size: int) -> int:
    """Bytes that a file of this size takes on disk."""
    return -(-size // _PAGE) * _PAGE
