"""The KV cache's disk: for each group of blocks, and for states, a cache of files and a thread that
writes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from localllm.backend.protocol import Backend
from localllm.engine.disk_cache import DiskCache
from localllm.engine.spiller import Spiller

_QUEUED = 256  # blocks of a group that wait to be written, at most
_CLOSING = 30.0  # seconds that closing waits for blocks still to be written


class DiskTier:
    """folder: shared by all models and processes. limit_bytes: of all that is in it."""

    def __init__(self, backend: Backend, folder: Path, limit_bytes: int) -> None:
        self._caches = []
        self._spillers = []
        reads: list[Callable[[int], np.ndarray]] = [
            partial(backend.read_block, group) for group in range(len(backend.group_blocks))
        ]
        counts = list(backend.group_blocks)
        if backend.state_slots:
            reads.append(backend.read_state)
            counts.append(backend.state_slots)
        for read, count in zip(reads, counts, strict=True):
            cache = DiskCache(folder, limit_bytes=limit_bytes, block_bytes=len(read(0)))
            self._caches.append(cache)
            self._spillers.append(Spiller(cache, read, queue=max(1, min(_QUEUED, count // 4))))

    @property
    def note(self) -> str | None:
        """Why the last block that could not be kept was not; None if all were."""
        return next((cache.note for cache in self._caches if cache.note), None)

    def has(self, group: int, name: bytes) -> bool:
        return name in self._caches[group]

    def load(self, group: int, name: bytes) -> np.ndarray | None:
        cache = self._caches[group]
        content = np.empty(cache.block_bytes, np.uint8)
        return content if cache.load(name, content) else None

    def save(self, group: int, name: bytes, content: np.ndarray) -> None:
        self._caches[group].save(name, content)

    def offer(self, group: int, block: int, name: bytes) -> bool:
        return self._spillers[group].offer(block, name)

    def finished(self) -> list[tuple[int, int]]:
        return [
            (group, block)
            for group, spiller in enumerate(self._spillers)
            for block in spiller.finished()
        ]

    def close(self) -> None:
        """Writes what waits, then ends the threads. The backend must still be open."""
        for spiller in self._spillers:
            spiller.drain(_CLOSING)
            spiller.close()
        for cache in self._caches:
            cache.close()
