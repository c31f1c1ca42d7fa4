"""Chats out and in, from the app's commands."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from localllm.tui.commands import by_slash
from localllm.tui.widgets.confirm import AskText
from tests.tui.app_host import answered, chat_app, say, told, until
from tests.tui.fake_engine import FakeEngine


async def command(pilot: Any, text: str) -> None:
    word, _, argument = text.partition(" ")
    found = by_slash(word)
    assert found is not None
    await pilot.app.run_command(found, argument)
    await pilot.pause()


def test_a_chat_goes_out_and_comes_in_as_it_was(tmp_path: Path):
    async def run() -> None:
        first = chat_app(FakeEngine("The moon."))
        async with first.run_test() as pilot:
            await say(pilot, "Why are there tides?")
            await answered(pilot)
            await command(pilot, f"export {tmp_path / 'one.md'}")
            await command(pilot, f"export-all '{tmp_path / 'all.jsonl'}'")
            said = told(first)
        for name in ("one.md", "all.jsonl"):
            second = chat_app()
            async with second.run_test() as pilot:
                await until(lambda app=second: app.ready, "it is ready")
                await command(pilot, f"import {tmp_path / name}")
                await until(lambda app=second: app.chat is not None, "the chat is open")
                assert told(second) == said
                assert second.chat.title == "Why are there tides?"
                await command(pilot, f"import {tmp_path / name}")
                await asyncio.sleep(0.1)
                assert second.store.count_chats() == 1

    asyncio.run(run())


def test_without_a_file_it_asks_and_what_is_wrong_is_told(tmp_path: Path):
    async def run() -> None:
        app = chat_app(FakeEngine("Hi."))
        async with app.run_test() as pilot:
            await say(pilot, "Hello")
            await answered(pilot)
            await command(pilot, "export")
            await until(lambda: isinstance(app.screen, AskText), "it asks")
            await pilot.press("escape")
            path = tmp_path / "chat.txt"
            await command(pilot, f"export {path}")
            assert not path.exists()
            path.write_text("mine")
            await command(pilot, f"export-all {path}")
            assert path.read_text() == "mine"  # no file is written over
            notes = [note.message for note in app._notifications]
            assert any("must be .md or .jsonl" in note for note in notes)
            assert any("is there already" in note for note in notes)

    asyncio.run(run())


def test_chatgpts_export_comes_in_beside_what_is_there(tmp_path: Path):
    def message(role: str, text: str) -> dict[str, Any]:
        return {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}}

    mapping = {
        "a": {"message": message("user", "[b]Why?[/b]\x1b[31m"), "parent": None},
        "b": {"message": message("assistant", "So."), "parent": "a"},
    }
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps([{"title": "[red]Old", "mapping": mapping}, {"mapping": 1}]))

    async def run() -> None:
        app = chat_app(FakeEngine("Hi."))
        async with app.run_test() as pilot:
            await say(pilot, "Hello")
            await answered(pilot)
            await command(pilot, f"import {path}")
            await until(lambda: app.store.count_chats() == 2, "it is in")
            await until(lambda: len(told(app)) == 2 and told(app)[1][1] == "So.", "it is open")
            notes = [note.message for note in app._notifications]
            assert any("1 chat from ChatGPT" in note for note in notes)
            assert any("not read: chat 2" in note for note in notes)

    asyncio.run(run())
