"""A full disk under the chat app: it is told, nothing said is lost, and the app goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ClassVar

import pytest
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Button

from localllm.errors import StoreError
from localllm.tui import answers
from localllm.tui.app import ChatApp
from localllm.tui.screens.view import View
from localllm.tui.store import Store
from tests.tui.app_host import answered, chat_app, say, shown, told, until
from tests.tui.fake_engine import FakeEngine

SIZE = (110, 32)
LONG = "a question of many words " * 20_000  # far more than the free pages of a database hold

ONE_PIECE = "word" * 25_000


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_TRY_AGAIN", 0.05)


@pytest.fixture
def store(tmp_path: Any) -> Any:
    with Store(tmp_path / "chats.db") as store:
        yield store


def fill(store: Store) -> None:
    """No further page is to be had."""
    store._db.execute("PRAGMA max_page_count = 1")  # SQLite takes the pages there are


def free(store: Store) -> None:
    store._db.execute("PRAGMA max_page_count = 1000000")


def notices(app: ChatApp) -> list[str]:
    return [notice.message for notice in app._notifications]


@asynccontextmanager
async def after_an_answer(store: Store) -> AsyncIterator[tuple[ChatApp, Any]]:
    """The app with its Pilot, once "Hello?" has been answered by "Here."."""
    app = chat_app(FakeEngine("Here."), store)
    async with app.run_test(size=SIZE) as pilot:
        await say(pilot, "Hello?")
        await answered(pilot)
        yield app, pilot


@contextmanager
def as_told() -> Any:
    with pytest.raises(StoreError, match="full") as caught:
        yield
    assert "free some space" in (caught.value.hint or "")


class TestTheStore:
    def test_it_tells_and_keeps_what_there_was(self, store: Store) -> None:
        chat = store.new_chat()
        first = store.add_message(chat.id, None, "user", "first")
        fill(store)
        with as_told():
            store.add_message(chat.id, first.id, "assistant", LONG)
        with as_told():
            store.edit_message(first.id, content=LONG)
        with as_told(), store.together():
            store.touch(chat.id)
            store.set_setting("wide", LONG)
        with as_told():
            store.new_chat(system=LONG)
        assert [message.content for message in store.tree(chat.id)] == ["first"]
        assert store.chat(chat.id) == store.chats()[0]
        free(store)
        assert store.add_message(chat.id, first.id, "assistant", LONG).content == LONG

    def test_an_outer_change_of_several_fails_as_a_whole(self, store: Store) -> None:
        chat = store.new_chat()
        fill(store)
        with as_told(), store.together():
            store.edit_chat(chat.id, title="new")
            store.add_message(chat.id, None, "user", LONG)
        assert not store.chat(chat.id).title
        assert not store.tree(chat.id)


def test_a_message_that_cannot_be_kept_stays_where_it_was_typed(store: Store) -> None:
    async def run() -> None:
        async with after_an_answer(store) as (app, pilot):
            before = told(app)
            fill(store)
            await say(pilot, LONG)
            assert app.chat_screen.composer.text == LONG
            assert any("full" in notice for notice in notices(app))
            assert told(app) == before
            assert not app.answers.live
            free(store)
            await pilot.press("enter")
            await answered(pilot)
            assert told(app) == [*before, ("user", LONG), ("assistant", "Here.")]
            assert app.chat_screen.composer.text == ""

    asyncio.run(run())


def test_an_answer_waits_until_there_is_room_for_it(store: Store) -> None:
    async def run() -> None:
        app = chat_app(FakeEngine(ONE_PIECE, delay=0.3), store)
        async with app.run_test(size=SIZE) as pilot:
            await say(pilot, "Hello?")
            fill(store)
            await until(lambda: notices(app), "it is told")
            await asyncio.sleep(0.3)
            assert len([one for one in notices(app) if "full" in one]) == 1
            assert app.answers.live  # so that its text is not taken from the store
            free(store)
            await answered(pilot)
            assert told(app) == [("user", "Hello?"), ("assistant", ONE_PIECE)]
            (_, answer) = store.tree(1)
            assert answer.status == "complete"

    asyncio.run(run())


def test_what_waits_for_an_answer_waits_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        app = chat_app(FakeEngine(["word " * 5000, "Short."], delay=0.002), store)
        async with app.run_test(size=SIZE) as pilot:
            await say(pilot, "First?")
            await say(pilot, "Second?")
            assert [said.content for said in app.answers.queued(1)] == ["Second?"]
            with monkeypatch.context() as patch:

                def full(*message: Any, **fields: Any) -> None:
                    raise StoreError("database or disk is full")

                patch.setattr(store, "add_message", full)
                app.answers.stop(1)
                await answered(pilot)
            await until(lambda: any("full" in notice for notice in notices(app)))
            assert [said.content for said in app.answers.queued(1)] == ["Second?"]
            await say(pilot, "Third?")
            await until(lambda: len(told(app)) == 6 and not app.answers.live, seconds=40)
            assert [text for role, text in told(app) if role == "user"] == [
                "First?",
                "Third?",
                "Second?",
            ]

    asyncio.run(run())


def test_an_edit_that_cannot_be_kept_goes_on(store: Store) -> None:
    async def run() -> None:
        async with after_an_answer(store) as (app, pilot):
            screen = app.chat_screen
            screen.begin_editing(store.message(1))
            screen.composer.put(LONG)
            fill(store)
            await pilot.press("enter")
            await pilot.pause()
            assert screen.editing == 1
            assert screen.composer.text == LONG
            free(store)
            await pilot.press("enter")
            await answered(pilot)
            assert told(app) == [("user", LONG), ("assistant", "Here.")]

    asyncio.run(run())


def test_a_draft_that_cannot_be_kept_is_told_once(store: Store) -> None:
    async def run() -> None:
        async with after_an_answer(store) as (app, pilot):
            fill(store)
            for more in ("one", "two"):
                app.chat_screen.composer.put(LONG + more)
                app.chat_screen.keep_draft()
            await until(lambda: notices(app))
            await pilot.pause()
            assert len(notices(app)) == 1
            free(store)
            app.chat_screen.keep_draft()
            assert store.chat(1).draft == LONG + "two"

    asyncio.run(run())


class Failing(View):
    """Everything on it needs the disk."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("f12", "fail", "Fail")]

    def body(self) -> ComposeResult:
        yield Button("message", id="message")

    def fail(self) -> None:
        raise StoreError("database or disk is full")

    def on_button_pressed(self) -> None:
        self.fail()

    def action_timer(self) -> None:
        self.set_timer(0.01, self.fail)

    def action_callback(self) -> None:
        self.call_after_refresh(self.fail)

    def action_fail(self) -> None:
        self.fail()

    @work
    async def action_worker(self) -> None:
        self.fail()


@pytest.mark.parametrize("how", ["message", "timer", "callback", "action", "worker"])
def test_wherever_it_happens_the_app_goes_on(how: str) -> None:
    async def run() -> None:
        app = chat_app()
        async with app.run_test(size=SIZE) as pilot:
            screen = Failing()
            await app.push_screen(screen)
            for number in (1, 2):
                if how == "message":
                    screen.query_one(Button).press()
                elif how == "action":
                    await pilot.press("f12")
                else:
                    await screen.run_action(how)
                await until(lambda number=number: len(notices(app)) == number, how)
            assert "full" in notices(app)[0]
            assert "message" in shown(app)

    asyncio.run(run())
