from __future__ import annotations

import pytest
from textual.widgets import Input, OptionList

from localllm.tui.answers import NEW_CHATS
from localllm.tui.sampling_fields import sampling_fields
from localllm.tui.screens.parameters import ParametersScreen
from localllm.tui.store import Preset
from localllm.tui.widgets.fields import Field
from tests.tui.fake_engine import FakeEngine
from tests.tui.view_host import HostApp, run, until


@pytest.fixture
def app():
    host = HostApp(FakeEngine(), ParametersScreen())
    host.with_chat("Hello", "Hi")
    return host


def field(app: HostApp, name: str) -> Field:
    return app.screen.query_one(f"#param-{name}", Field)


def params(app: HostApp) -> dict:
    assert app.chat_id is not None
    return dict(app.store.chat(app.chat_id).params)


@run()
async def test_a_sound_value_is_the_chats_at_once(app, pilot):
    await pilot.press("home", "ctrl+k", *"0.25")
    await pilot.pause()
    assert params(app) == {"temperature": 0.25}
    assert field(app, "temperature").has_class("-changed")


@run()
async def test_an_unsound_value_is_marked_and_changes_nothing(app, pilot):
    await pilot.press("home", "ctrl+k", *"-1")
    await pilot.pause()
    assert params(app) == {}
    assert field(app, "temperature").has_class("-wrong")
    await pilot.press("home", "ctrl+k", *"0.5")
    await pilot.pause()
    assert not field(app, "temperature").has_class("-wrong")
    assert params(app) == {"temperature": 0.5}


@run()
async def test_what_cannot_go_together_is_told_at_a_field(app, pilot):
    field(app, "mirostat").query_one(Input).value = "2"
    field(app, "top_k").query_one(Input).value = "40"
    await pilot.pause()
    wrong = app.screen.query(".-wrong")
    assert [one.field_name for one in wrong] == ["mirostat"]
    assert params(app) == {}
    field(app, "top_k").query_one(Input).value = "0"
    await pilot.pause()
    assert params(app) == {"mirostat": 2}


@run()
async def test_a_preset_is_saved_and_used(app, pilot):
    await pilot.press("home", "ctrl+k", *"0.1", "ctrl+s", *"careful", "enter")
    await pilot.pause()
    assert app.store.presets() == [Preset("careful", {"temperature": 0.1})]
    await pilot.press("ctrl+r")
    await pilot.pause()
    await pilot.pause()
    assert params(app) == {}
    app.screen.query_one(OptionList).focus()
    await pilot.press("home", "enter")
    await pilot.pause()
    await pilot.pause()
    assert params(app) == {"temperature": 0.1}


@run()
async def test_a_preset_of_another_version_is_refused(app, pilot):
    app.store.save_preset(Preset("odd", {"heat": 3}))
    app.screen._show_presets()
    app.screen.query_one(OptionList).focus()
    await pilot.press("home", "enter")
    await pilot.pause()
    assert params(app) == {}


@run()
async def test_without_a_chat_new_ones_begin_with_them(app, pilot):
    app.chat_id = None
    await pilot.press("home", "ctrl+k", *"0.75")
    await pilot.pause()
    assert app.store.setting(NEW_CHATS) == {"temperature": 0.75}


@run()
async def test_what_the_models_makers_recommend_is_shown_and_can_be_changed(app, pilot):
    assert field(app, "temperature").value == "0.6"
    await pilot.press("home", "ctrl+k", *"1")
    await pilot.pause()
    assert params(app) == {"temperature": 1.0}
    await pilot.press("home", "ctrl+k", *"0.6")
    await pilot.pause()
    assert params(app) == {}


@run()
async def test_what_is_below_the_screen_is_there_too_and_in_its_place(app, pilot):
    await until(pilot, lambda: field(app, "prompt_logprobs").is_mounted)
    names = [one.field_name for one in app.screen.query(Field)]
    assert names == [one.name for one in sampling_fields()]
    field(app, "best_of").query_one(Input).value = "4"
    await until(pilot, lambda: params(app) == {"best_of": 4})


def with_wrong_values() -> HostApp:
    host = HostApp(FakeEngine(), ParametersScreen())
    host.with_chat("Hello", "Hi", params={"n": 3, "best_of": 2})
    return host


@run(with_wrong_values)
async def test_what_is_wrong_below_the_screen_is_told_there(app, pilot):
    await until(pilot, lambda: field(app, "best_of").is_mounted)
    await until(pilot, lambda: bool(app.screen.query("#param-best_of .error, #param-n .error")))
    assert "not saved" in str(app.screen.query_one(".view-title").content)
