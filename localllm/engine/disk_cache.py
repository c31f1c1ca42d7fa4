"""KV blocks on disk, where they survive a restart: a bounded folder of files that prove themselves.

PLACE/ab/ab….kv   one full block: 64 bytes of header, then the payload; named by its digest
PLACE/parts/*     being written, locked by its writer; without a lock what a killed one left

A block never changes, so a file is either whole and right or worthless. It appears by a rename,
and its checksum is verified whenever it is read; nothing needs to be synced. Several processes may
use one folder: each sees what the others did by the change times of the sub-folders.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from localllm.engine.disk_index import OPEN, DiskIndex, pages
from localllm.hub.lock import locked_part, remove_abandoned

HEADER_BYTES = 64
RESERVE = 1 << 30  # bytes of disk that stay free
_MAGIC = b"LLMKV\x00\x00\x01"  # the last byte is the form; another form is no block of ours
_HEAD = struct.Struct("<8s32sQ12x")  # magic, digest, payload bytes; the CRC-32 follows
_CRC = struct.Struct("<I")
_LOOK_AGAIN = 1.0  # seconds between looks for blocks that other processes saved
_READERS = 4
Digest = bytes  # 32 of them; the name `bytes` means a size inside the class
Payload = bytes | bytearray | memoryview | np.ndarray


class DiskCache:
    """Full KV blocks by their 32-byte digests, least recently used first to go.

    folder: made if it is missing, readable by its owner only: blocks tell of prompts.
    limit_bytes: the folder's files never take more, unfinished ones counted, in whole pages.
        With several processes the limit holds to within one block for each.
    block_bytes: size of every payload. Blocks of other sizes in the folder belong to other models;
        they count towards the limit and make room like all.
    reserve_bytes: what stays free on the disk, whatever the limit says.

    No method raises for a disk that is full, read-only or broken: `note` tells why the last block
    that was not saved was not. Safe to call from several threads.

    The checksum is CRC-32, the fastest of those at hand: it finds every damage within 32 bits in a
    row and all but one in 2**32 of others. It is no defence against who may write to the folder.
    """

    def __init__(
        self, folder: Path, *, limit_bytes: int, block_bytes: int, reserve_bytes: int = RESERVE
    ) -> None:
        assert block_bytes > 0
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.block_bytes = block_bytes
        self.note: str | None = None
        self._reserve = reserve_bytes
        self._file_bytes = HEADER_BYTES + block_bytes
        self._parts = folder / "parts"
        self._index = DiskIndex(folder)
        self._saving = threading.Lock()  # one unfinished file of this process at a time
        self._readers: ThreadPoolExecutor | None = None
        self._looked = 0.0
        with contextlib.suppress(OSError):
            for part in os.scandir(self._parts):
                remove_abandoned(Path(part.path))
        self._glance()

    @property
    def blocks(self) -> int:
        """Blocks of any size, as last seen."""
        return len(self._index)

    @property
    def bytes(self) -> int:
        """What the blocks take on disk in whole pages, as last seen."""
        return self._index.total

    def __contains__(self, digest: Digest) -> bool:
        """Whether the block was here when last looked; `load` may still find it gone or damaged."""
        if self._index.size(digest) == self._file_bytes:
            return True
        if time.monotonic() - self._looked < _LOOK_AGAIN:
            return False
        self._glance()
        return self._index.size(digest) == self._file_bytes

    def load(self, digest: Digest, into: np.ndarray) -> bool:
        """Reads a block into uint8 [block_bytes]; after False the array's content means nothing.

        A file that is not exactly this block is removed.
        """
        assert into.dtype == np.uint8
        assert into.shape == (self.block_bytes,)
        assert into.flags.c_contiguous
        path = self._index.path(digest)
        try:
            handle = os.open(path, OPEN)
        except FileNotFoundError:
            self._index.forget(digest)
            return False
        except OSError:
            return False
        try:
            if self._read(handle, digest, into):
                self._index.use(digest, handle, self._file_bytes)
                return True
        except OSError:
            pass  # what cannot be read is as good as damaged
        finally:
            os.close(handle)
        if _unlink(path):  # otherwise it still takes its room
            self._index.forget(digest)
        return False

    def load_many(self, wanted: Sequence[tuple[Digest, np.ndarray]]) -> list[bool]:
        """`load` for each, several at a time: reading and checking leave the interpreter free."""
        if len(wanted) < 4:
            return [self.load(digest, into) for digest, into in wanted]
        if self._readers is None:
            threads = min(_READERS, os.cpu_count() or 1)
            self._readers = ThreadPoolExecutor(threads, thread_name_prefix="kv-load")
        return list(self._readers.map(lambda item: self.load(*item), wanted))

    def save(self, digest: Digest, payload: Payload) -> bool:
        """Keeps a block; False, and a `note`, if it cannot be kept."""
        data = memoryview(payload).cast("B")  # type: ignore[arg-type]  # arrays are buffers
        assert data.nbytes == self.block_bytes
        with self._saving:
            try:
                if self._index.refresh_use(digest, self._file_bytes):
                    return True
                problem = self._make_room()
                if problem is None:
                    self._write(digest, data)
            except OSError as error:
                problem = f"{self.folder}: {error.strerror or error}"
            if problem is not None:
                self.note = problem
            return problem is None

    def close(self) -> None:
        """Ends the reading threads. Idempotent."""
        readers, self._readers = self._readers, None
        if readers is not None:
            readers.shutdown()

    def _read(self, handle: int, digest: Digest, into: np.ndarray) -> bool:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size != self._file_bytes:
            return False
        header = bytearray(HEADER_BYTES)
        got = os.readv(handle, [header, into.data])
        while got < self._file_bytes:  # rare: a file system may give less at a time
            if got < HEADER_BYTES:
                return False
            more = os.pread(handle, self._file_bytes - got, got)
            if not more:
                return False
            into[got - HEADER_BYTES : got - HEADER_BYTES + len(more)] = np.frombuffer(
                more, np.uint8
            )
            got += len(more)
        return bytes(header) == _header(digest, into.data)

    def _write(self, digest: Digest, data: memoryview) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._parts.mkdir(mode=0o700, exist_ok=True)
        handle, part = locked_part(self._parts, mode=0o600)
        try:
            header = _header(digest, data)
            done = os.writev(handle, [header, data])
            while done < self._file_bytes:
                rest = header[done:] or data[done - HEADER_BYTES :]
                done += os.write(handle, rest)
            path = self._index.path(digest)
            try:
                os.replace(part, path)
            except FileNotFoundError:
                path.parent.mkdir(mode=0o700, exist_ok=True)
                os.replace(part, path)
            self._index.use(digest, handle, self._file_bytes)
        except BaseException:
            _unlink(part)
            raise
        finally:
            os.close(handle)

    def _make_room(self) -> str | None:
        """Removes the least recently used until one more block fits; or why it cannot."""
        self._index.refresh()
        needed = pages(self._file_bytes)
        if needed > self.limit_bytes:
            return f"a block of {needed} bytes is more than the limit of {self.limit_bytes}"
        if self._reserve:
            place = next(p for p in (self.folder, *self.folder.parents) if p.exists())
            free = shutil.disk_usage(place).free
            if free < needed + self._reserve:
                return f"{free >> 20} MiB are free on the disk of {self.folder}, too few to use"
        unfinished = self._unfinished_bytes()
        while self._index.total + unfinished + needed > self.limit_bytes:
            if not self._index.remove_oldest():
                return f"{self.folder}: what is there cannot be removed to make room"
        return None

    def _unfinished_bytes(self) -> int:
        """What other writers are at: each may grow to a whole block."""
        total = 0
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._parts):
                part = Path(entry.path)
                remove_abandoned(part)
                with contextlib.suppress(FileNotFoundError):
                    total += max(pages(part.stat().st_size), pages(self._file_bytes))
        return total

    def _glance(self) -> None:
        self._looked = time.monotonic()
        with contextlib.suppress(OSError):
            self._index.refresh()


def _header(digest: bytes, payload: memoryview) -> bytes:
    head = _HEAD.pack(_MAGIC, digest, payload.nbytes)
    return head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head)))


def _unlink(path: Path) -> bool:
    """Whether the file is gone now."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


assert _HEAD.size + _CRC.size == HEADER_BYTES
