from __future__ import annotations

from textual.widgets import Static

from localllm.errors import LocalLLMError
from localllm.tui.screens.inspector import InspectorScreen, TokenText
from localllm.tui.tokens import Alternative, TokenView, keep_tokens, kept_tokens
from localllm.tui.widgets.table import Table
from tests.tui.fake_engine import FakeEngine
from tests.tui.view_host import HostApp, run, until

ANSWER = "Air scatters [b]blue[/b] light more\nthan red light does"


def make(said: str = ANSWER, reasoning: str = "", **engine) -> HostApp:
    host = HostApp(FakeEngine(script=lambda request: ANSWER, **engine))
    chat = host.with_chat("Why?", said, adapter="/an/adapter", adapter_weight=0.5)
    head = host.store.chat(chat).head
    host.store.edit_message(
        head,
        receipt={"seed": 42, "generated_tokens": 8},
        params={"temperature": 0.7, "n": 3},
        reasoning=reasoning,
    )
    host.head = head  # type: ignore[attr-defined]
    host._first = InspectorScreen(head)
    return host


def about(app: HostApp) -> str:
    return str(app.screen.query_one("#about", Static).content)


async def ready(app: HostApp, pilot) -> None:
    await until(pilot, lambda: bool(app.screen.query(Table)) and about(app) != "")


@run(make)
async def test_the_answer_is_drawn_again_with_its_seed(app, pilot):
    await ready(app, pilot)
    (request,) = app.engine.asks
    assert request.params == {"temperature": 0.7, "seed": 42, "max_tokens": 8}
    assert [m["content"] for m in request.messages] == ["Why?"]
    assert request.logprobs > 0
    assert about(app).startswith("token 1 of 8, id 0: 74.1%, choice 1")
    assert str(app.screen.query_one("#said", Static).content) == ""


@run(lambda: make("I was edited"))
async def test_an_edited_answer_is_told_apart(app, pilot):
    await ready(app, pilot)
    assert "differs from the one that is kept" in str(app.screen.query_one("#said", Static).content)


@run(make)
async def test_keys_go_from_token_to_token_and_to_surprises(app, pilot):
    await ready(app, pilot)
    await pilot.press("right", "l", "left")
    assert about(app).startswith("token 2 of 8")
    await pilot.press("n")
    assert about(app).startswith("token 4 of 8, id 3: 22.3%, choice 2")
    await pilot.press("n")
    assert about(app).startswith("token 8 of 8")
    await pilot.press("N")
    assert about(app).startswith("token 4 of 8")
    # The fifth token holds the line's end; below it the answer goes on.
    await pilot.press("h", "h", "h", "down")
    assert about(app).startswith("token 6 of 8")
    await pilot.press("up")
    assert about(app).startswith("token 1 of 8")


@run(make)
async def test_a_click_chooses_its_token(app, pilot):
    await ready(app, pilot)
    await pilot.click(TokenText, offset=(6, 0))
    assert about(app).startswith("token 2 of 8")


@run(make)
async def test_another_choice_is_a_new_branch_that_goes_on(app, pilot):
    await ready(app, pilot)
    await pilot.press("n", "enter", "home", "enter")
    await until(pilot, lambda: bool(app.answers.gone_on))
    (sibling,) = app.answers.gone_on
    message = app.store.message(sibling)
    assert message.content == "Air scatters [b]blue[/b] [likelier]"
    assert message.parent == app.store.message(app.head).parent
    assert message.extra == {"forked_from": app.head, "prefix": message.content}
    assert app.store.message(app.head).content == ANSWER
    assert app.opened == [(app.chat_id, sibling)]


@run(make)
async def test_a_fork_is_drawn_again_from_where_it_began(app, pilot):
    await ready(app, pilot)
    app.store.edit_message(app.head, extra={"prefix": "Air is"}, content="Air is" + ANSWER)
    app.pop_screen()
    await app.push_screen(InspectorScreen(app.head))
    await until(pilot, lambda: len(app.engine.asks) == 2)
    await ready(app, pilot)
    assert app.engine.asks[1].messages[-1] == {"role": "assistant", "content": "Air is"}
    assert about(app).startswith("token 1 of 9, id -1: not told")
    assert str(app.screen.query_one("#said", Static).content) == ""


@run(make)
async def test_the_token_that_was_drawn_makes_no_branch(app, pilot):
    await ready(app, pilot)
    await pilot.press("enter", "enter")
    await pilot.pause()
    assert app.answers.gone_on == []
    assert len(app.store.tree(app.chat_id)) == 2


@run(lambda: make(reasoning="Let me think."))
async def test_a_token_of_the_thinking_makes_no_branch(app, pilot):
    await ready(app, pilot)
    await pilot.press("enter", "down", "enter")
    await pilot.pause()
    assert app.answers.gone_on == []


@run(lambda: make(fails=LocalLLMError("the engine has ended")))
async def test_an_engine_that_fails_is_told(app, pilot):
    said = app.screen.query_one("#said", Static)
    await until(pilot, lambda: str(said.content) == "the engine has ended")


def test_tokens_are_kept_for_the_last_answers_as_they_are():
    app = make()
    message = app.store.message(app.head)
    tokens = [
        TokenView(n, text, -0.1, (Alternative(n, text, -0.1),))
        for n, text in enumerate(ANSWER.replace(" ", "| ").split("|"))
    ]
    keep_tokens(app, message.id, tokens)
    assert kept_tokens(app, message) == tokens
    app.store.edit_message(message.id, content="changed")
    assert kept_tokens(app, app.store.message(message.id)) is None
    for other in range(1000, 1020):
        keep_tokens(app, other, tokens)
    assert kept_tokens(app, message) is None
