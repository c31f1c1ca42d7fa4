"""Several answers at once are siblings: branches like any other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from localllm.tui.answers import Live
from localllm.tui.app import ChatApp
from localllm.tui.commands import find
from localllm.tui.engine.remote import RemoteEngine
from localllm.tui.store import Message
from localllm.tui.tool_settings import ToolSettings
from tests.tiny_model import write_tiny_model
from tests.tui.app_host import answered, chat_app, say, until
from tests.tui.fake_engine import FakeEngine

Test = Callable[[ChatApp, Pilot[None]], Awaitable[None]]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path / "home"))


def drive(engine: Any, test: Test, **opening: Any) -> None:
    async def whole() -> None:
        app = chat_app(engine, **opening)
        async with app.run_test(size=(110, 36)) as pilot:
            await test(app, pilot)

    asyncio.run(asyncio.wait_for(whole(), 100))


def newest(app: ChatApp) -> list[Message]:
    """The answers to the last question."""
    assert app.chat is not None
    head = app.store.message(app.chat.head or 0)
    return app.store.children(app.chat.id, head.parent)


def live(app: ChatApp) -> tuple[Live, ...]:
    (first,) = app.answers.live.values()
    return first.all


def test_the_first_is_open_and_the_others_stand_beside_it():
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await say(pilot, "Why?")
        await until(lambda: len(app.answers.live) == 1)
        assert {message.status for message in newest(app)} == {"writing"}  # a kill loses none
        await answered(pilot)
        first, second, third = newest(app)
        assert [m.content for m in (first, second, third)] == [
            "Air scatters blue.",
            "2: Air scatters blue.",
            "3: Air scatters blue.",
        ]
        assert app.chat.head == first.id
        assert {m.status for m in (first, second, third)} == {"complete"}
        # Each can be drawn again alone.
        assert [m.params["seed"] for m in (first, second, third)] == [7, 8, 9]
        assert all("n" not in m.params for m in (first, second, third))
        view = app.chat_screen.transcript.views[-1]
        assert view.place == (1, 3)
        await pilot.press("ctrl+g", "l")
        await until(lambda: app.chat.head == second.id)

    drive(FakeEngine("Air scatters blue.", delay=0.3), test, params={"n": 3})


def test_stopping_keeps_every_part():
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await say(pilot, "Why?")
        await until(lambda: app.answers.live and all(one.text for one in live(app)))
        await pilot.press("escape")
        await answered(pilot)
        assert [m.status for m in newest(app)] == ["stopped", "stopped"]
        assert all(m.content for m in newest(app))

    drive(FakeEngine("one two " * 50, delay=0.05), test, params={"n": 2})


def test_several_answers_cannot_call_tools_and_that_is_told():
    engine = FakeEngine("Never.")

    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await until(lambda: app.ready)
        assert app.tools is not None
        app.tools.changed(ToolSettings(on=("calculator",)))
        await say(pilot, "Why?")
        await answered(pilot)
        assert engine.asks == []
        (notice,) = app._notifications
        assert "2 answers at once cannot call tools" in notice.message

    drive(engine, test, params={"n": 2})


def test_the_real_engine_gives_n_the_best_of_some_and_beams(tmp_path: Path):
    tiny = write_tiny_model(tmp_path / "tiny", max_position_embeddings=2048)

    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await until(lambda: app.engine.state.phase == "ready", "the model is loaded", 60)
        await say(pilot, "Say something.")
        await answered(pilot)
        drawn = newest(app)
        assert len(drawn) == 3
        assert len({m.content for m in drawn}) == 3
        assert [m.receipt["generated_tokens"] for m in drawn] == [8, 8, 8]

        app.store.edit_chat(app.chat_id, head=drawn[2].id)
        await app.chat_screen.load()
        await app.run_command(find("replay"))
        await answered(pilot)
        assert newest(app)[-1].content == drawn[2].content  # alone, from its own seed

        app.store.edit_chat(app.chat_id, params={"n": 1, "best_of": 3, "seed": 5})
        await say(pilot, "Once more.")
        await answered(pilot)
        (best,) = newest(app)
        assert best.content
        assert best.params["seed"] in (5, 6, 7)

        app.store.edit_chat(app.chat_id, params={"n": 2, "beams": 3, "temperature": 1.0})
        await say(pilot, "And again.")
        await answered(pilot)
        beams = newest(app)
        assert [m.extra["sample"] for m in beams] == [0, 1]
        assert len({m.content for m in beams}) == 2

    params = {"n": 3, "temperature": 1.5, "max_tokens": 8, "ignore_eos": True, "seed": 5}
    drive(RemoteEngine(), test, model=str(tiny), params=params, options={"context": 512})
