from __future__ import annotations

import asyncio

import pytest
from textual.widgets import Static

from localllm.tui.widgets import approval
from localllm.tui.widgets.approval import ApprovalScreen, shown_json
from localllm.tui.widgets.tool_result import ToolResult, tool_line
from tests.tui.fake_engine import FakeEngine
from tests.tui.view_host import HostApp, run

HOSTILE = {"path": "[b]/etc[/b]", "note": "\x1b[31mred\x1b[0m"}


@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        (["enter"], "refuse"),  # in haste
        (["escape"], "refuse"),
        (["n"], "refuse"),
        (["y"], "once"),
        (["a"], "always"),
        (["tab", "enter"], "always"),
        (["tab", "tab", "enter"], "once"),
    ],
)
def test_a_call_is_allowed_by_choice_only(keys, answer):
    answers: list[str | None] = []

    @run()
    async def drive(app, pilot):
        await app.push_screen(ApprovalScreen("read_file", HOSTILE, source="files"), answers.append)
        await pilot.pause()
        shown = " ".join(str(one.content) for one in app.screen.query(Static))
        assert "read_file (files)" in shown
        assert "[b]/etc[/b]" in shown
        assert "\x1b" not in shown
        await pilot.press(*keys)
        await pilot.pause()

    drive(HostApp(FakeEngine()))
    assert answers == [answer]


def test_letters_typed_on_when_the_question_comes_do_not_answer_it(monkeypatch):
    monkeypatch.setattr(approval, "PAUSE", 1.5)
    answers: list[str | None] = []

    @run()
    async def drive(app, pilot):
        await app.push_screen(ApprovalScreen("read_file", {}, source="files"), answers.append)
        await pilot.press(*"any day")
        assert answers == []
        await asyncio.sleep(1.6)
        await pilot.press("y")
        await pilot.pause()

    drive(HostApp(FakeEngine()))
    assert answers == ["once"]


def test_long_arguments_are_bounded():
    text = shown_json({"text": "x" * 100_000})
    assert len(text) < 21_000
    assert "characters more" in text


def test_what_is_no_json_is_shown_all_the_same():
    assert "object" in shown_json({"x": object()})


def test_a_result_is_folded_to_a_line_and_shown_as_text():
    @run()
    async def drive(app, pilot):
        result = ToolResult("read_file", HOSTILE)
        await app.screen.mount(result)
        await pilot.pause()
        assert result.collapsed
        assert str(result.title).endswith("…")
        result.say("[red]one[/red]\ntwo \x1b[2J", "done")
        await pilot.pause()
        assert str(result.title).endswith("[red]one[/red] two ")
        assert str(result.query_one(".result", Static).content) == "[red]one[/red]\ntwo "
        result.say("no such file", "failed")
        assert result.has_class("-failed")
        assert "failed: no such file" in str(result.title)
        result.say(None, "refused")
        assert not result.has_class("-failed")
        assert str(result.title).endswith("refused")

    drive(HostApp(FakeEngine()))


def test_the_line_is_short():
    assert len(tool_line("read", {"path": "x" * 900}, "y" * 900, "done")) < 140
