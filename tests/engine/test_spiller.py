"""The spiller saves what it is offered, never holds more than its queue, and survives errors."""

from __future__ import annotations

import threading

import pytest

from localllm.engine.spiller import Spiller
from tests.engine.test_disk_cache import digest, loaded, open_cache, payload


@pytest.fixture
def cache(tmp_path):
    return open_cache(tmp_path / "kv")


def test_offered_blocks_are_saved_and_listed_once(cache):
    spiller = Spiller(cache, payload, queue=8)
    assert all(spiller.offer(block, digest(block)) for block in range(5))
    assert spiller.drain(10)
    assert spiller.finished() == [0, 1, 2, 3, 4]
    assert spiller.finished() == []
    assert [loaded(cache, block) for block in range(5)] == [payload(block) for block in range(5)]
    spiller.close()


def test_a_block_already_on_disk_or_on_its_way_is_not_taken(cache):
    cache.save(digest(1), payload(1))
    gate = threading.Event()
    spiller = Spiller(cache, lambda block: gate.wait(10) and payload(block), queue=8)
    assert not spiller.offer(1, digest(1))
    assert spiller.offer(2, digest(2))
    assert not spiller.offer(7, digest(2))
    gate.set()
    assert spiller.drain(10)
    assert spiller.finished() == [2]
    spiller.close()


def test_a_full_queue_takes_no_more_and_pins_nothing(cache):
    gate = threading.Event()
    spiller = Spiller(cache, lambda block: gate.wait(10) and payload(block), queue=3)
    assert [spiller.offer(block, digest(block)) for block in range(5)] == [True] * 3 + [False] * 2
    assert not spiller.drain(0.01)
    assert spiller.finished() == []
    gate.set()
    assert spiller.drain(10)
    assert spiller.finished() == [0, 1, 2]
    assert spiller.offer(3, digest(3))
    spiller.close()


def test_an_error_in_read_costs_one_block_only(cache):
    def read(block):
        if block == 0:
            raise RuntimeError("no such block")
        return payload(block)

    spiller = Spiller(cache, read, queue=8)
    for block in range(3):
        spiller.offer(block, digest(block))
    assert spiller.drain(10)
    assert spiller.finished() == [0, 1, 2]
    assert str(spiller.error) == "no such block"
    assert [digest(block) in cache for block in range(3)] == [False, True, True]
    spiller.close()


def test_a_disk_that_takes_nothing_still_gives_every_block_back(tmp_path):
    (tmp_path / "file").write_text("in the way")
    spiller = Spiller(open_cache(tmp_path / "file"), payload, queue=8)
    assert all(spiller.offer(block, digest(block)) for block in range(4))
    assert spiller.drain(10)
    assert spiller.finished() == [0, 1, 2, 3]
    spiller.close()


def test_closing_drops_what_waits_and_gives_it_back(cache):
    gate, begun = threading.Event(), threading.Event()

    def read(block):
        begun.set()
        gate.wait(10)
        return payload(block)

    spiller = Spiller(cache, read, queue=8)
    for block in range(4):
        spiller.offer(block, digest(block))
    begun.wait(10)
    threading.Timer(0.05, gate.set).start()
    spiller.close()
    spiller.close()
    assert sorted(spiller.finished()) == [0, 1, 2, 3]
    assert [digest(block) in cache for block in range(4)] == [True, False, False, False]
    assert not spiller.offer(9, digest(9))
    assert spiller.drain(0)
