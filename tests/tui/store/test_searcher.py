"""Keys never wait for a search, however many messages hold the words."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest

from localllm.errors import StoreError
from localllm.tui.store import Store, searcher
from localllm.tui.store.searcher import Searcher

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "chats #1?.db") as opened:
        chat = opened.new_chat(title="Trip").id
        for text in ("to the lighthouse", "a river", "the lighthouse again"):
            opened.add_message(chat, None, "user", text)
        yield opened


def test_it_finds_what_the_store_finds_also_what_came_later(store):
    async def go():
        search = Searcher(store)
        try:
            assert await search.search("lighthouse") == store.search("lighthouse")
            store.add_message(1, None, "user", "one more lighthouse")
            assert len(await search.search("lighthouse")) == 3
            assert len(await search.search("lighthouse", 2)) == 2
            assert await search.search("  ") == []
        finally:
            search.close()

    asyncio.run(go())


def test_a_newer_search_ends_the_one_before_and_nothing_else_waits(store, monkeypatch):
    usual = searcher.find_messages

    def find(db: sqlite3.Connection, words: str, limit: int):
        return db.execute(ENDLESS).fetchall() if words == "endless" else usual(db, words, limit)

    monkeypatch.setattr(searcher, "find_messages", find)

    async def go():
        search = Searcher(store)
        endless = asyncio.create_task(search.search("endless"))
        await asyncio.sleep(0.1)  # this would not come back if the search held the loop
        assert not endless.done()
        assert len(await search.search("river")) == 1
        assert await endless == []
        last = asyncio.create_task(search.search("endless"))
        await asyncio.sleep(0.05)
        search.close()
        assert await last == []

    asyncio.run(asyncio.wait_for(go(), 20))


def test_what_is_wrong_is_told(store, monkeypatch):
    def find(db: sqlite3.Connection, words: str, limit: int):
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(searcher, "find_messages", find)

    async def go():
        search = Searcher(store)
        with pytest.raises(StoreError, match="malformed"):
            await search.search("river")
        search.close()

    asyncio.run(go())


def test_chats_in_memory_are_searched_too():
    async def go():
        with Store(":memory:") as store:
            store.add_message(store.new_chat().id, None, "user", "hello")
            assert len(await Searcher(store).search("hel")) == 1

    asyncio.run(go())
