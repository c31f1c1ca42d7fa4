"""Search beside whoever uses the store: a common word takes longer than a key may wait."""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor

from localllm.errors import StoreError
from localllm.tui.store.records import Hit
from localllm.tui.store.store import Store, find_messages


class Searcher:
    """`Store.search` in a thread, over a connection of its own; a newer search ends the one before.

    store: one that is kept in a file; of one in memory the search is done at once.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, "localllm-search")
        self._db: sqlite3.Connection | None = None

    async def search(self, words: str, limit: int = 50) -> list[Hit]:
        """Empty too if a newer one came meanwhile. Raises StoreError."""
        if str(self._store.path) == ":memory:":
            return self._store.search(words, limit)
        self._interrupt()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._search, words, limit)

    def close(self) -> None:
        self._interrupt()
        self._thread.submit(self._close)
        self._thread.shutdown(wait=False)

    # ---- inside

    def _interrupt(self) -> None:
        if self._db is not None:
            self._db.interrupt()

    def _search(self, words: str, limit: int) -> list[Hit]:
        """In the thread."""
        try:
            if self._db is None:
                self._db = sqlite3.connect(self._store.path, timeout=5, check_same_thread=False)
                self._db.execute("PRAGMA query_only = ON")
            return find_messages(self._db, words, limit)
        except sqlite3.Error as error:
            if "interrupted" in str(error):
                return []
            raise StoreError(f"the chats cannot be searched: {error}") from error

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
