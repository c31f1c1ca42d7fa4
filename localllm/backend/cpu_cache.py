"""Packed weights kept on disk, so that the next start reads them instead of packing again.

A cache is only ever a gain: when it cannot be read or written the backend packs as without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from localllm.kernels_cpu import _native
from localllm.spec import DecoderSpec

_KEPT = 4  # models; the least recently used go first
_RESERVE = 1 << 30  # bytes of disk that stay free


class PackedCache:
    """Packed models in `folder`, keyed by the content of their weight files.

    note: why the last `store` call packed anew or could not keep the result; None if all went
    well.
    """

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._folder = folder
        self._files = [file.resolve() for file in files]
        self.note: str | None = None

    def store(
        self, spec: DecoderSpec, pack: Callable[[], _native.WeightStore]
    ) -> _native.WeightStore:
        """The packed weights: read if they are here, else made by `pack` and kept."""
        self.note = None
        try:
            path = self._folder / f"{self._key(spec)}.packed"
        except OSError as error:
            self.note = f"no cache of packed weights: {error}"
            return pack()
        try:
            store = _native.WeightStore.open(str(path))
            with contextlib.suppress(OSError):
                os.utime(path)
        except RuntimeError:
            store = pack()
            self._keep(store, path)
        return store

    def _keep(self, store: _native.WeightStore, path: Path) -> None:
        temporary = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
            if free < store.nbytes + _RESERVE:
                raise OSError(f"{free >> 20} MiB free on its disk are too few")
            handle, name = tempfile.mkstemp(dir=self._folder, suffix=".part")
            os.close(handle)
            temporary = Path(name)
            store.save(name)
            temporary.replace(path)
            self._evict()
        except (OSError, RuntimeError) as error:
            self.note = f"packed weights could not be kept in {self._folder}: {error}"
            if temporary is not None:
                with contextlib.suppress(OSError):
                    temporary.unlink()

    def _evict(self) -> None:
        kept = sorted(self._folder.glob("*.packed"), key=lambda p: p.stat().st_mtime_ns)
        for path in kept[:-_KEPT]:
            path.unlink(missing_ok=True)

    def _key(self, spec: DecoderSpec) -> str:
        digest = hashlib.sha256(repr(spec).encode())
        for file in self._files:
            digest.update(self._content(file).encode())
        return digest.hexdigest()[:40]

    def _content(self, file: Path) -> str:
        """sha256 of a file, remembered for as long as its size, times and inode stay."""
        status = file.stat()
        seen = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        place = hashlib.sha256(os.fsencode(file)).hexdigest()[:40]
        memory = self._folder / f"{place}.hash"
        try:
            known = json.loads(memory.read_text())
            if known["seen"] == seen:
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            part = memory.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps({"seen": seen, "sha256": sha256}))
            part.replace(memory)
        return sha256
