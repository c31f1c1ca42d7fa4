"""The views from the chat app: every command opens its screen, rates, teaches or answers again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from localllm.tui.app import ChatApp
from localllm.tui.commands import COMMANDS, find
from localllm.tui.screens.adapters import AdaptersScreen
from localllm.tui.screens.compare import CompareScreen
from localllm.tui.screens.dataset import DatasetScreen
from localllm.tui.screens.engine_views import EngineScreen
from localllm.tui.screens.finetune import FinetuneScreen
from localllm.tui.screens.inspector import InspectorScreen
from localllm.tui.screens.learning import TeachScreen
from localllm.tui.screens.models import ModelsScreen
from localllm.tui.screens.parameters import ParametersScreen
from localllm.tui.screens.prompts import PromptsScreen
from localllm.tui.store import Store
from localllm.tui.tokens import kept_tokens
from tests.tui.fake_engine import FakeEngine
from tests.tui.view_host import until

SCREENS: dict[str, type] = {
    "models": ModelsScreen,
    "adapters": AdaptersScreen,
    "parameters": ParametersScreen,
    "prompts": PromptsScreen,
    "compare": CompareScreen,
    "engine": EngineScreen,
    "tokens": InspectorScreen,
    "dataset": DatasetScreen,
    "finetune": FinetuneScreen,
    "teach": TeachScreen,
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path / "home"))


def drive(
    tmp_path: Path, test: Callable[[ChatApp, Pilot[None]], Awaitable[None]], script: Any = "Air."
) -> None:
    """Runs `test` in the app, with an answered question open."""

    async def all_of_it() -> None:
        with Store(":memory:") as store:
            chat = store.new_chat(model="smollm2:135m", system="Be brief.")
            asked = store.add_message(chat.id, None, "user", "Why?")
            store.add_message(
                chat.id,
                asked.id,
                "assistant",
                "Air.",
                model="smollm2:135m",
                params={"temperature": 0.3, "seed": 77},
            )
            app = ChatApp(store, FakeEngine(script), config=tmp_path)  # type: ignore[arg-type]
            async with app.run_test(size=(110, 36)) as pilot:
                await until(pilot, lambda: app.ready)
                await app.open_chat(chat.id)
                await pilot.pause()
                await test(app, pilot)

    asyncio.run(all_of_it())


def test_every_view_opens_by_its_key_or_command_and_leaves_by_escape(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        for name, kind in SCREENS.items():
            command = find(name)
            if command.keys and command.where in ("everywhere", "chat"):
                await pilot.press(command.keys[0])
            else:
                await app.run_command(command)
            await until(pilot, lambda kind=kind: isinstance(app.screen, kind))
            await pilot.press("escape")
            await until(pilot, lambda: app.screen is app.chat_screen)

    drive(tmp_path, test)


def test_opposite_ratings_make_a_pair(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await app.run_command(find("rate-good"))
        chat = app.store.chat(app.chat_id)
        parent = app.store.message(chat.head).parent
        worse = app.store.add_message(chat.id, parent, "assistant", "It just is.")
        await app.open_chat(chat.id, worse.id)
        await pilot.pause()
        await app.run_command(find("rate-bad"))
        (pair,) = app.store.pairs()
        assert (pair.chosen, pair.rejected) == ("Air.", "It just is.")

    drive(tmp_path, test)


def test_a_better_answer_is_taught(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await app.run_command(find("teach"))
        await until(pilot, lambda: isinstance(app.screen, TeachScreen))
        await pilot.press("end", *" Light.", "ctrl+s")
        await until(pilot, lambda: len(app.store.pairs()) == 2)
        await until(pilot, lambda: app.screen is app.chat_screen)
        head = app.store.message(app.store.chat(app.chat_id).head)
        assert head.content == "Air. Light."

    drive(tmp_path, test)


def test_answering_again_asks_with_what_was_asked_then(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        # What was set since does not hold.
        app.store.edit_chat(app.chat_id, params={"top_k": 5, "temperature": 1.5})
        before = app.store.chat(app.chat_id).head
        await app.run_command(find("replay"))
        await until(pilot, lambda: not app.answers.live and bool(app.engine.asks))
        assert app.engine.asks[0].params == {"temperature": 0.3, "seed": 77}
        head = app.store.message(app.store.chat(app.chat_id).head)
        assert head.id != before
        assert head.parent == app.store.message(before).parent
        assert head.content == "Air."

    drive(tmp_path, test)


def test_the_tokens_of_an_answer_are_kept_for_the_views(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await app.run_command(find("replay"))
        await until(pilot, lambda: not app.answers.live and bool(app.engine.asks))
        head = app.store.message(app.store.chat(app.chat_id).head)
        tokens = kept_tokens(app, head)
        assert tokens is not None
        assert [token.text for token in tokens] == ["Three", " words", " here."]

    drive(tmp_path, test, "Three words here.")


def test_a_number_compares_at_once_and_nonsense_is_told(tmp_path):
    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        await app.run_command(find("compare"), "99")
        assert app.screen is app.chat_screen
        await app.run_command(find("engine"), "nonsense")
        assert app.screen is app.chat_screen
        await app.run_command(find("compare"), "2")
        await until(pilot, lambda: len(app.engine.asks) == 2)

    drive(tmp_path, test)


def test_every_view_is_found_by_a_newcomer(tmp_path):
    """In the palette and the help by title, by a slash, most by a key."""

    async def test(app: ChatApp, pilot: Pilot[None]) -> None:
        known = {command.name: command for command in COMMANDS}
        for name in [*SCREENS, "tools", "replay", "rate-good", "rate-bad"]:
            assert known[name].slash, name
            assert known[name].help, name
        footer = {command.name for command in COMMANDS if command.shown_in_footer}
        assert {"models", "parameters", "engine"} <= footer

    drive(tmp_path, test)
