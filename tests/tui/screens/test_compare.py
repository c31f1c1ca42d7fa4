from __future__ import annotations

import pytest
from textual.widgets import Select, Static

from localllm.tui.screens.compare import Column, CompareScreen, Variant, before_and_after
from localllm.tui.widgets.fields import Field
from tests.tui.fake_engine import FakeEngine, echo
from tests.tui.view_host import HostApp, run, until


def app_with(*variants: Variant, **engine) -> HostApp:
    host = HostApp(FakeEngine(echo, **engine), CompareScreen(variants or None, run=bool(variants)))
    host.with_chat("Why [b]blue[/b]?", "Because.", system="Be brief.")
    return host


def texts(app: HostApp) -> list[str]:
    return [str(one.query_one(".text", Static).content) for one in app.screen.query(Column)]


def states(app: HostApp) -> list[str]:
    return [str(one.query_one(".foot", Static).content) for one in app.screen.query(Column)]


def test_what_is_compared_is_named_shortly():
    before, after = before_and_after("/home/me/.cache/localllm/runs/poet-1", 0.5)
    assert before.title() == "without an adapter, seed 0"
    assert after.title() == "adapter poet-1 x0.5, seed 0"


@pytest.fixture
def app():
    return app_with(Variant(temperature=0.0), Variant(temperature=1.2), Variant(seed=5))


@run()
async def test_every_answer_is_asked_with_its_own_parameters(app, pilot):
    await until(pilot, lambda: all("stop" in state for state in states(app)))
    asked = [(r.params.get("temperature"), r.params.get("seed")) for r in app.engine.asks]
    assert asked == [(0.0, None), (1.2, None), (None, 5)]
    assert [m["role"] for m in app.engine.asks[0].messages] == ["system", "user"]
    assert len(set(texts(app))) == 3


@run()
async def test_the_chosen_one_goes_on_and_each_other_is_a_pair(app, pilot):
    await until(pilot, lambda: all("stop" in state for state in states(app)))
    said = texts(app)
    await pilot.press("2", "enter")
    await pilot.pause()
    chat = app.store.chat(app.chat_id)
    head = app.store.message(chat.head)
    assert head.content == said[1]
    assert head.params["temperature"] == 1.2
    siblings = [m.content for m in app.store.children(chat.id, head.parent)]
    assert sorted(siblings) == sorted(["Because.", *said])
    pairs = app.store.pairs()
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {
        (said[1], said[0]),
        (said[1], said[2]),
    }
    assert {pair.origin for pair in pairs} == {"compare"}
    assert pairs[0].prompt[-1]["content"] == "Why [b]blue[/b]?"
    assert app.opened == [(chat.id, head.id)]


@run()
async def test_leaving_keeps_nothing(app, pilot):
    await until(pilot, lambda: all("stop" in state for state in states(app)))
    await pilot.press("escape")
    await pilot.pause()
    assert len(app.store.tree(app.chat_id)) == 2
    assert app.store.pairs() == []


@run(lambda: app_with(Variant(), Variant(), delay=1.0))
async def test_stopped_answers_keep_their_part(app, pilot):
    await until(pilot, lambda: any(texts(app)))
    await pilot.press("s")
    await until(pilot, lambda: all("cancelled" in state for state in states(app)))
    assert all(texts(app))


@run(lambda: app_with())
async def test_the_form_says_what_it_cannot_read(app, pilot):
    field = app.screen.query_one("#form Field", Field)
    await pilot.press("home", "ctrl+k", *"99", "enter")
    await pilot.pause()
    assert field.has_class("-wrong")
    app.screen.query_one("#by", Select).value = "temperature"
    await pilot.pause()
    assert field.value == "0, 0.7, 1.2"
    field.focus_input()
    await pilot.press("enter")
    await until(pilot, lambda: len(texts(app)) == 3)
    assert not field.has_class("-wrong")


@run(lambda: app_with(Variant(), Variant(model="gemma3:270m")))
async def test_another_model_answers_after_the_loaded_one_which_comes_back(app, pilot):
    await until(pilot, lambda: [s[:4] for s in states(app)] == ["stop", "stop"])
    await until(pilot, lambda: app.engine.state.model.name == "smollm2:135m")
    assert app.engine.opened == ["gemma3:270m", "smollm2:135m"]


@run(lambda: app_with(*before_and_after("/tmp/adapter", 0.5)))
async def test_before_and_after_differ_in_the_adapter_alone(app, pilot):
    await until(pilot, lambda: [s[:4] for s in states(app)] == ["stop", "stop"])
    requests = app.engine.asks
    assert [(r.adapter, r.adapter_weight) for r in requests] == [(None, 1.0), ("/tmp/adapter", 0.5)]
    assert [r.params["seed"] for r in requests] == [0, 0]


@run(lambda: HostApp(FakeEngine(), CompareScreen()))
async def test_without_a_question_nothing_is_asked(app, pilot):
    await pilot.press("enter")
    await pilot.pause()
    assert app.engine.asks == []


@run(lambda: app_with())
async def test_the_chats_n_says_how_many_and_each_column_is_one_of_them(app, pilot):
    assert app.screen.query_one("#form Field", Field).value == "3"
    await pilot.press("escape")
    app.store.edit_chat(app.chat_id, params={"n": 4})
    app.push_screen(CompareScreen())
    await until(pilot, lambda: bool(app.screen.query("#form Field")))
    app.screen.query_one("#form Field", Field).focus_input()
    await pilot.press("enter")
    await until(pilot, lambda: len(texts(app)) == 4)
    await until(pilot, lambda: all("stop" in state for state in states(app)))
    assert [request.n for request in app.engine.asks] == [1, 1, 1, 1]
    await pilot.press("2", "enter")
    await until(pilot, lambda: len(app.store.tree(app.chat_id)) > 2)
    assert all("n" not in message.params for message in app.store.tree(app.chat_id))
