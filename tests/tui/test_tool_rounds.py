"""Tools in a chat: calls are asked about, made, kept in the tree and shown folded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from localllm.errors import InvalidRequest
from localllm.tui.app import ChatApp
from localllm.tui.engine.client import ToolCall
from localllm.tui.store import Store
from localllm.tui.tool_settings import ToolSettings, write_tool_settings
from localllm.tui.tools import box
from localllm.tui.widgets.approval import ApprovalScreen
from localllm.tui.widgets.message import MessageView
from localllm.tui.widgets.tool_result import ToolResult
from tests.tui.fake_engine import FakeEngine
from tests.tui.view_host import until

READ = ToolCall("read_file", {"path": "note.txt"})
SUM = ToolCall("calculator", {"expression": "6*7"})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path / "home"))
    (tmp_path / "read").mkdir()
    (tmp_path / "read" / "note.txt").write_text("the [b]secret[/b] is 42")


def drive(
    tmp_path: Path,
    script: list[Any],
    test: Callable[[ChatApp, Pilot[None]], Awaitable[None]],
    *,
    on: tuple[str, ...] = ("calculator", "read_file"),
    rounds: int = 5,
    titled: int = 1,
) -> FakeEngine:
    engine = FakeEngine(script)

    async def all_of_it() -> None:
        with Store(":memory:") as store:
            settings = ToolSettings(on, str(tmp_path / "read"), rounds)
            write_tool_settings(store, settings)
            chat = store.new_chat(model="smollm2:135m", titled=titled, title="t")
            asked = store.add_message(chat.id, None, "user", "What is it?")
            app = ChatApp(store, engine, config=tmp_path)  # type: ignore[arg-type]
            async with app.run_test(size=(110, 36)) as pilot:
                await until(pilot, lambda: app.ready)
                await app.open_chat(chat.id)
                app.answers.ask(chat.id, asked.id)
                await app.chat_screen.load()
                await test(app, pilot)

    asyncio.run(all_of_it())
    return engine


def branch(app: ChatApp) -> list[tuple[str, str]]:
    found = app.store.branch(app.store.chat(app.chat_id).head)
    return [(message.role, message.content) for message in found]


def idle(app: ChatApp) -> bool:
    return not app.answers.live


def test_a_call_that_was_allowed_is_made_and_the_answer_goes_on(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: isinstance(app.screen, ApprovalScreen))
        assert app.store.message(app.store.chat(app.chat_id).head).extra["state"] == "running"
        await pilot.press("y")
        await until(pilot, lambda: idle(app))
        assert [role for role, _ in branch(app)] == ["user", "assistant", "tool", "assistant"]
        assert "the [b]secret[/b] is 42" in branch(app)[2][1]
        assert branch(app)[3] == ("assistant", "It is 42.")
        messages = app.store.branch(app.store.chat(app.chat_id).head)
        assert messages[1].extra["tool_calls"][0]["function"]["name"] == "read_file"
        assert {message.status for message in messages} == {"complete"}
        (result,) = app.screen.query(ToolResult)
        await until(pilot, lambda: "secret" in str(result.title))
        assert result.collapsed

    engine = drive(tmp_path, [("I will look.", [READ]), "It is 42."], test)
    again = engine.asks[1].messages
    assert [message["role"] for message in again] == ["user", "assistant", "tool"]
    assert again[1]["tool_calls"][0]["id"] == again[2]["tool_call_id"]


def test_a_refused_call_is_not_made(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: isinstance(app.screen, ApprovalScreen))
        await pilot.press("escape")
        await until(pilot, lambda: idle(app))
        assert "secret" not in branch(app)[2][1]
        assert branch(app)[3] == ("assistant", "As you like.")
        messages = app.store.branch(app.store.chat(app.chat_id).head)
        assert messages[2].extra["state"] == "refused"

    drive(tmp_path, [("", [READ]), "As you like."], test)


def test_what_was_allowed_for_the_chat_is_not_asked_again(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: isinstance(app.screen, ApprovalScreen))
        await pilot.press("a")
        await until(pilot, lambda: idle(app))
        roles = [role for role, _ in branch(app)]
        assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]

    drive(tmp_path, [("", [READ]), ("", [READ]), "Twice."], test)


def test_calls_and_results_stay_where_the_answer_after_them_fails(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: isinstance(app.screen, ApprovalScreen))
        app.engine.fails = InvalidRequest("the prompt is too long")  # type: ignore[attr-defined]
        await pilot.press("y")
        await until(pilot, lambda: idle(app))
        assert [role for role, _ in branch(app)] == ["user", "assistant", "tool"]
        assert "the [b]secret[/b] is 42" in branch(app)[2][1]
        await until(pilot, lambda: app._notifications)
        assert any("too long" in note.message for note in app._notifications)
        assert len(app.screen.query(MessageView)) == 3

    drive(tmp_path, [("", [READ]), "Never said."], test)


def test_a_stop_while_a_tool_is_called_ends_the_call_and_keeps_what_was_said(tmp_path, monkeypatch):
    async def mute(arguments: Any) -> str:
        await asyncio.sleep(600)
        return ""

    monkeypatch.setattr(box, "CALCULATOR", replace(box.CALCULATOR, call=mute))

    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: [role for role, _ in branch(app)][-1] == "tool")
        await pilot.press("escape")
        await until(pilot, lambda: idle(app))
        assert [role for role, _ in branch(app)] == ["user", "assistant", "tool"]
        messages = app.store.branch(app.store.chat(app.chat_id).head)
        assert messages[2].extra["state"] == "failed"
        assert messages[2].extra["tool"] == "calculator"
        assert "stopped" in messages[2].content
        assert {message.status for message in messages} == {"complete"}

    drive(tmp_path, [("", [SUM]), "Never said."], test)


def test_tools_that_are_off_are_not_offered(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: idle(app))

    engine = drive(tmp_path, ["No tools."], test, on=())
    assert engine.asks[0].tools == []


def test_rounds_are_bounded(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: idle(app))
        assert [role for role, _ in branch(app)].count("tool") == 2

    drive(tmp_path, [("More.", [SUM])], test, rounds=2)


def test_a_chat_is_named_after_an_answer_that_used_tools_too(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await until(pilot, lambda: idle(app) and len(branch(app)) == 4)
        await until(pilot, lambda: app.store.chat(app.chat_id).titled == 2)
        assert app.store.chat(app.chat_id).title == "The product of six and seven"

    script = [("", [SUM]), "It is 42.", "The product of six and seven"]
    engine = drive(tmp_path, script, test, titled=0)
    asked = engine.asks[2].messages[0]["content"]
    assert "What is it?" in asked
    assert "It is 42." in asked
