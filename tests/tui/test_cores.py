"""A core for the app while the engine computes on all of them."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from localllm.tui.engine.client import EngineGone
from localllm.tui.engine.cores import APP, SERVER, Cores
from localllm.tui.engine.remote import RemoteEngine
from tests.tiny_model import write_tiny_model

ASKED = [{"role": "user", "content": "Write about the sea."}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=16_384)


@asynccontextmanager
async def engine_of(model: Path, cores: Cores, **options: int) -> AsyncIterator[RemoteEngine]:
    engine = RemoteEngine(cores=cores)
    try:
        await engine.open(str(model), **options)
        yield engine
    finally:
        await engine.close()


def test_both_processes_see_what_either_says() -> None:
    ours = Cores()
    theirs = Cores(ours.file)
    theirs.computing = True
    assert ours.computing
    ours.borrow(APP)
    theirs.borrow(SERVER)
    assert list(theirs.borrowers) == list(ours.borrowers) == [1, 1]
    theirs.give_back(APP)
    assert list(ours.borrowers) == [0, 1]
    theirs.computing = False
    assert not ours.computing


@pytest.mark.parametrize("computing", [True, False])
def test_a_core_is_borrowed_for_work_and_given_back_for_waiting(computing: bool) -> None:
    cores = Cores()
    cores.computing = computing
    borrowed = []  # while it works; while it waits

    def look() -> None:
        borrowed.append(cores.borrowers[APP])

    async def main() -> None:
        await asyncio.sleep(0.01)
        borrowed.append(cores.borrowers[APP])
        threading.Timer(0.05, look).start()
        await asyncio.sleep(0.2)
        borrowed.append(cores.borrowers[APP])

    cores.run(main(), APP)
    assert borrowed == [int(computing), 0, int(computing)]


def test_work_that_goes_on_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only after a wait is there something to borrow: each turn of the loop would cost time."""
    cores = Cores()
    cores.computing = True
    held_up: list[float] = []
    monkeypatch.setattr(time, "sleep", held_up.append)

    async def main() -> None:
        await asyncio.sleep(0.01)
        before = len(held_up)
        assert before
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(held_up) == before

    cores.run(main(), APP)


def test_cores_are_borrowed_only_while_an_answer_is_under_way(tiny: Path) -> None:
    cores = Cores()

    async def main() -> None:
        async with engine_of(tiny, cores) as engine:
            assert not cores.computing
            asked = engine.ask(ASKED, {"max_tokens": 10_000, "ignore_eos": True})
            pieces = aiter(asked)
            for _ in range(3):
                await anext(pieces)
                assert cores.computing
                assert cores.borrowers[APP]
            asked.stop()
            async for _ in pieces:
                pass
            assert not cores.computing

    cores.run(asyncio.wait_for(main(), 60), APP)


def test_an_engine_that_was_killed_leaves_nothing_borrowed(tiny: Path) -> None:
    cores = Cores()

    async def main() -> None:
        async with engine_of(tiny, cores) as engine:
            asked = engine.ask(ASKED, {"max_tokens": 100_000, "ignore_eos": True})
            await anext(aiter(asked))
            assert cores.computing
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(EngineGone):
                async for _ in asked:
                    pass
            await engine.restart()
            await asyncio.sleep(0.01)
            assert not cores.computing
            assert list(cores.borrowers) == [0, 0]

    cores.run(asyncio.wait_for(main(), 60), APP)


def test_an_answer_is_the_same_however_often_cores_are_borrowed(smollm2: Path) -> None:
    cores = Cores()
    texts = []

    async def main() -> None:
        params = {"max_tokens": 60, "temperature": 0}
        async with engine_of(smollm2, cores, threads=3) as engine:
            for flicker in (False, True):
                over = threading.Event()

                def borrow(flicker: bool = flicker, over: threading.Event = over) -> None:
                    while flicker and not over.is_set():
                        for change in (cores.borrow, cores.give_back):
                            change(APP)
                            time.sleep(0.0003)
                            change(SERVER)
                            time.sleep(0.0003)

                thread = threading.Thread(target=borrow)
                thread.start()
                asked = engine.ask(ASKED, params)
                texts.append("".join([piece.text async for piece in asked]))
                over.set()
                thread.join()

    asyncio.run(asyncio.wait_for(main(), 60))
    assert texts[0]
    assert texts[0] == texts[1]
