"""Writes KV blocks to disk behind the engine's back, a bounded number at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from localllm.engine.disk_cache import DiskCache, Payload


class Spiller:
    """One daemon thread that copies offered blocks out of the pool and saves them.

    The engine must neither free nor overwrite an offered block until `finished` lists it.

    read: gives a block's payload; called on the thread.
    queue: offered blocks that are not finished, at most.
    """

    def __init__(self, cache: DiskCache, read: Callable[[int], Payload], *, queue: int) -> None:
        assert queue > 0
        self.error: Exception | None = None  # the last that `read` raised; its block is not saved
        self._cache = cache
        self._read = read
        self._limit = queue
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._finished: list[int] = []
        self._digests: set[bytes] = set()  # waiting or being written
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="kv-spill", daemon=True)
        self._thread.start()

    def offer(self, block: int, digest: bytes) -> bool:
        """Takes a block to save. False, and nothing to wait for, if there is no need or no room."""
        if digest in self._cache:
            return False
        with self._change:
            if self._closed or digest in self._digests or len(self._digests) >= self._limit:
                return False
            self._digests.add(digest)
            self._waiting.append((block, digest))
            self._change.notify_all()
            return True

    def finished(self) -> list[int]:
        """Blocks that are done with, saved or not, since this was last asked."""
        with self._change:
            blocks, self._finished = self._finished, []
            return blocks

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until nothing is left to write; False if that takes more than `timeout` seconds."""
        with self._change:
            return self._change.wait_for(lambda: not self._digests, timeout)

    def close(self) -> None:
        """Drops what waits and ends the thread, after the block it is writing. Idempotent."""
        with self._change:
            self._closed = True
            while self._waiting:
                self._end(*self._waiting.popleft())
            self._change.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                block, digest = self._waiting.popleft()
            try:
                self._cache.save(digest, self._read(block))
            except Exception as error:
                self.error = error
            finally:
                with self._change:
                    self._end(block, digest)

    def _end(self, block: int, digest: bytes) -> None:
        self._digests.discard(digest)
        self._finished.append(block)
        self._change.notify_all()
