from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from textual.widgets import Static

from localllm.tui.screens.tools import ServerFacts, ToolFacts, ToolsScreen
from localllm.tui.store import Store
from localllm.tui.tool_settings import (
    ToolSettings,
    allow,
    allowed,
    approve,
    read_tool_settings,
    write_tool_settings,
)
from localllm.tui.widgets.approval import ApprovalScreen
from localllm.tui.widgets.confirm import AskText, Confirm
from tests.tui.fake_engine import FakeEngine
from tests.tui.view_host import HostApp, run, until


class FakeBox:
    config = Path("/config/mcp.toml")

    def __init__(self) -> None:
        self.settings: list[ToolSettings] = []
        self.dead = False

    def tools(self) -> list[ToolFacts]:
        schema = {"type": "object", "properties": {"path": {"type": "string"}}}
        return [
            ToolFacts("calculator", "built in", "Computes [b]sums[/b]", {}),
            ToolFacts("read_file", "built in", "Reads a file", schema),
        ]

    def servers(self) -> list[ServerFacts]:
        if self.dead:
            return [ServerFacts("files", "npx files [x]", "failed", error="it has ended")]
        running = bool(self.settings) and self.settings[-1].servers
        return [ServerFacts("files", "npx files [x]", "running" if running else "off", 3 * running)]

    def changed(self, settings: ToolSettings) -> None:
        self.settings.append(settings)
        self.dead = False


@pytest.fixture
def app():
    box = FakeBox()
    host = HostApp(FakeEngine(), ToolsScreen(box))
    host.box = box  # type: ignore[attr-defined]
    host.with_chat("Hello", "Hi")
    return host


def shown(app: HostApp) -> str:
    return str(app.screen.query_one("#settings", Static).content)


@run()
async def test_everything_is_off_until_it_is_turned_on(app, pilot):
    assert read_tool_settings(app.store) == ToolSettings()
    await pilot.press("j", "enter")
    await pilot.pause()
    assert read_tool_settings(app.store).on == ("read_file",)
    assert app.box.settings[-1].on == ("read_file",)
    assert '"path"' in str(app.screen.query_one("#facts", Static).content)
    await pilot.press("enter")
    await pilot.pause()
    assert read_tool_settings(app.store).on == ()


@run()
async def test_servers_are_started_only_when_their_commands_were_agreed_to(app, pilot):
    await pilot.press("m")
    await pilot.pause()
    assert isinstance(app.screen, Confirm)
    assert "npx files [x]" in app.screen._question
    await pilot.press("escape")
    await pilot.pause()
    assert app.box.settings == []
    await pilot.press("m")
    await pilot.pause()
    await pilot.press("y")
    await until(pilot, lambda: "running, 3 tools" in shown(app))
    await pilot.press("m")
    await until(pilot, lambda: "not started" in shown(app))


@run()
async def test_a_server_that_has_ended_is_started_again(app, pilot):
    await pilot.press("s")
    assert app.box.settings == []  # they are off
    await pilot.press("m")
    await until(pilot, lambda: isinstance(app.screen, Confirm))
    await pilot.press("y")
    await until(pilot, lambda: "running, 3 tools" in shown(app))
    app.box.dead = True
    await until(pilot, lambda: "failed: it has ended" in shown(app))
    await pilot.press("s")
    await until(pilot, lambda: "running, 3 tools" in shown(app))
    assert any("Started: files" in note.message for note in app._notifications)


@run()
async def test_a_folder_that_is_none_is_refused(app, pilot):
    await pilot.press("f")
    await until(pilot, lambda: isinstance(app.screen, AskText))
    app.screen.dismiss("/no/such/folder")
    await until(pilot, lambda: bool(app._notifications))
    assert read_tool_settings(app.store).folder == ""
    await pilot.press("f")
    await until(pilot, lambda: isinstance(app.screen, AskText))
    app.screen.dismiss("/tmp")
    await until(pilot, lambda: read_tool_settings(app.store).folder == "/tmp")
    await pilot.press("f")
    await until(pilot, lambda: isinstance(app.screen, AskText))
    app.screen.dismiss(".")
    await until(pilot, lambda: read_tool_settings(app.store).folder == "")


@run()
async def test_rounds_are_bounded(app, pilot):
    for typed, rounds in (("99", 5), ("3", 3)):
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, AskText))
        app.screen.dismiss(typed)
        await until(pilot, lambda: isinstance(app.screen, ToolsScreen))
        await pilot.pause()
        assert read_tool_settings(app.store).rounds == rounds


@run()
async def test_calls_allowed_for_good_are_of_this_chat_and_can_be_taken_back(app, pilot):
    async def ask(chat: int, *keys: str) -> bool:
        asked = asyncio.create_task(approve(app, app.store, chat, "read_file", {"path": "a"}))
        if keys:
            await until(pilot, lambda: isinstance(app.screen, ApprovalScreen))
            await pilot.press(*keys)
        return await asked

    chat = app.chat_id
    other = app.store.new_chat().id
    assert not await ask(chat, "escape")
    assert await ask(chat, "y")
    assert await ask(chat, "a")
    assert await ask(chat)  # not asked again
    assert not await ask(other, "n")
    app.screen._read()
    assert "read_file" in shown(app)
    await pilot.press("a")
    await pilot.pause()
    assert allowed(app.store, chat) == []


@pytest.mark.parametrize(
    "kept", [[], {"on": 3, "folder": 4, "rounds": 0}, {"servers": "yes", "rounds": True}]
)
def test_settings_that_make_no_sense_are_none(kept):
    with Store(":memory:") as store:
        store.set_setting("tools", kept)
        settings = read_tool_settings(store)
        assert (settings.on, settings.folder, settings.servers) == ((), "", False)
        assert 1 <= settings.rounds <= 20


def test_settings_are_kept():
    with Store(":memory:") as store:
        settings = ToolSettings(("a", "b"), "/tmp", 7, True).turned("a", False)
        write_tool_settings(store, settings)
        assert read_tool_settings(store) == settings
        allow(store, 1, ["a"])
        assert (allowed(store, 1), allowed(store, 2)) == (["a"], [])
