from __future__ import annotations

import pytest
from textual.widgets import OptionList, TextArea

from localllm.tui.screens.prompts import FillIn, PromptsScreen
from localllm.tui.store import Prompt
from tests.tui.fake_engine import FakeEngine
from tests.tui.view_host import HostApp, run


@pytest.fixture
def app():
    host = HostApp(FakeEngine(), PromptsScreen())
    host.with_chat("Hello", "Hi", system="Be [b]brief[/b].")
    host.store.save_prompt(Prompt("pirate", "system", "You are a pirate."))
    host.store.save_prompt(Prompt("translate", "user", "To {{language=French}}: {{text}}"))
    return host


@run()
async def test_the_chats_system_prompt_is_edited(app, pilot):
    area = app.screen.query_one(TextArea)
    assert area.text == "Be [b]brief[/b]."
    await pilot.press("enter", "end", *" Ok", "ctrl+s")
    await pilot.pause()
    assert app.store.chat(app.chat_id).system == "Be [b]brief[/b]. Ok"


@run()
async def test_a_system_prompt_of_the_library_becomes_the_chats(app, pilot):
    await pilot.press("down", "enter")
    await pilot.pause()
    assert app.store.chat(app.chat_id).system == "You are a pirate."
    assert app.opened == [(app.chat_id, None)]


@run()
async def test_variables_are_filled_in_and_the_message_waits_to_be_sent(app, pilot):
    await pilot.press("down", "down", "enter")
    await pilot.pause()
    assert isinstance(app.screen, FillIn)
    await pilot.press("enter", *"{{text}}", "enter")
    await pilot.pause()
    assert app.store.chat(app.chat_id).draft == "To French: {{text}}"


@run()
async def test_leaving_the_form_changes_nothing(app, pilot):
    await pilot.press("down", "down", "enter")
    await pilot.pause()
    await pilot.press("escape")
    await pilot.pause()
    assert app.store.chat(app.chat_id).draft == ""
    assert isinstance(app.screen, PromptsScreen)


@run()
async def test_prompts_are_made_saved_and_deleted(app, pilot):
    await pilot.press("n", *"new one", "enter")
    await pilot.pause()
    await pilot.press(*"Say {{x}}", "ctrl+s")
    await pilot.pause()
    assert Prompt("new one", "user", "Say {{x}}") in app.store.prompts()
    app.screen.query_one(OptionList).focus()
    await pilot.pause()
    await pilot.press("delete")
    await pilot.pause()
    await pilot.press("y")
    await pilot.pause()
    assert "new one" not in [prompt.name for prompt in app.store.prompts()]


@run()
async def test_the_chats_system_prompt_goes_into_the_library(app, pilot):
    await pilot.press("ctrl+l")
    await pilot.pause()
    await pilot.press(*"mine", "enter")
    await pilot.pause()
    assert Prompt("mine", "system", "Be [b]brief[/b].") in app.store.prompts()


@run()
async def test_a_name_is_not_taken_twice_without_asking(app, pilot):
    await pilot.press("ctrl+l")
    await pilot.pause()
    await pilot.press(*"pirate", "enter")
    await pilot.pause()
    await pilot.press("escape")
    await pilot.pause()
    assert Prompt("pirate", "system", "You are a pirate.") in app.store.prompts()
