"""The chat: asking, stopping, waiting, branching, finding again; nothing said is lost."""

from __future__ import annotations

import asyncio

import pytest
from textual import events

from localllm.tui.answers import NEW_CHATS
from localllm.tui.engine.client import EngineGone
from localllm.tui.settings import Settings
from localllm.tui.store import Store
from localllm.tui.widgets.confirm import Confirm
from localllm.tui.widgets.markdown import CodeBlock
from localllm.tui.widgets.message import MessageView
from localllm.tui.widgets.status import Banner, Queue
from localllm.tui.widgets.transcript import Transcript
from tests.tui.app_host import answered, chat_app, say, shown, told, until
from tests.tui.fake_engine import FakeEngine

WIDE = (110, 32)


def test_a_question_is_answered_shown_and_kept():
    async def run() -> None:
        engine = FakeEngine("It **is** the light.")
        app = chat_app(engine)
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "Why is the sky blue?")
            await answered(pilot)
            assert told(app) == [
                ("user", "Why is the sky blue?"),
                ("assistant", "It **is** the light."),
            ]
            text = shown(app)
            assert "It is the light." in text
            assert "61 tok/s" in text
            message = app.store.message(2)
            assert message.status == "complete"
            assert message.params["seed"] == 7
            assert message.receipt["prompt_tokens"] == 120
            assert app.chat.title == "Why is the sky blue?"

    asyncio.run(run())


def test_what_is_typed_before_a_chat_is_open_is_said_and_what_follows_stays():
    async def run() -> None:
        app = chat_app()
        async with app.run_test(size=WIDE):
            assert not app.ready
            for key in ("h", "i", "enter", "m", "e"):
                app.simulate_key(key)
            await until(lambda: app.ready and len(app.store.chats()) == 1)
            await until(lambda: app.chat_screen.composer.text == "me")
            assert told(app)[0] == ("user", "hi")

    asyncio.run(run())


def test_a_question_asked_while_the_model_loads_waits_for_it():
    async def run() -> None:
        engine = FakeEngine("Here I am.")
        loaded = asyncio.Event()
        whole = engine.open

        async def slow(model: str, **options: object) -> None:
            from localllm.tui.engine.client import EngineState

            engine.tell(EngineState("loading", "reading weights", 0.5))
            await loaded.wait()
            await whole(model)

        engine.open = slow  # type: ignore[method-assign]
        app = chat_app(engine)
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "Are you there?")
            assert "reading weights 50%" in shown(app)
            assert not engine.asks
            loaded.set()
            await answered(pilot)
            assert told(app)[-1] == ("assistant", "Here I am.")

    asyncio.run(run())


def test_escape_stops_the_answer_and_keeps_its_part():
    async def run() -> None:
        app = chat_app(FakeEngine("word " * 2000, delay=0.002))
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "Talk")
            await until(lambda: app.answers.live and app.answers.live[1].tokens > 5, "some words")
            await pilot.press("escape")
            await answered(pilot)
            message = app.store.message(2)
            assert message.status == "stopped"
            assert 5 < len(message.content.split()) < 2000
            assert "[stopped]" in shown(app)

    asyncio.run(run())


def test_a_message_said_meanwhile_waits_can_be_taken_back_and_is_answered_in_turn():
    async def run() -> None:
        def script(request):
            asked = request.messages[-1]["content"]
            return "word " * 5000 if asked == "first" else f"re: {asked}"

        app = chat_app(FakeEngine(script, delay=0.01))
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "first")
            await say(pilot, "second")
            await say(pilot, "third")
            assert [said.typed for said in app.answers.queued(1)] == ["second", "third"]
            assert "waits 1: second" in str(app.screen.query_one("#queue", Queue).render())
            await pilot.press("ctrl+z")
            assert app.chat_screen.composer.text == "third"
            app.chat_screen.composer.put("")
            await pilot.press("escape")
            await until(lambda: len(told(app)) == 4, "the second is asked")
            await answered(pilot)
            assert [text for role, text in told(app) if role == "user"][1:] == ["second"]
            assert told(app)[-1] == ("assistant", "re: second")

    asyncio.run(run())


def test_editing_a_question_makes_a_branch_and_the_old_one_stays():
    async def run() -> None:
        engine = FakeEngine(lambda request: f"re: {request.messages[-1]['content']}")
        app = chat_app(engine)
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "first")
            await answered(pilot)
            await pilot.press("ctrl+g", "k", "e")
            assert app.chat_screen.composer.text == "first"
            await pilot.press("end", *"ly", "enter")
            await answered(pilot)
            assert told(app) == [("user", "firstly"), ("assistant", "re: firstly")]
            assert "2/2" in shown(app)
            app.chat_screen.transcript.choose_last("user")
            await pilot.press("h")
            await pilot.pause()
            assert told(app) == [("user", "first"), ("assistant", "re: first")]
            assert len(app.store.tree(1)) == 4

    asyncio.run(run())


def test_an_edited_answer_is_a_sibling_an_example_to_learn_from_and_can_go_on():
    async def run() -> None:
        engine = FakeEngine(["The answ", " is 42."])
        app = chat_app(engine)
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "What?")
            await answered(pilot)
            await pilot.press("ctrl+g", "e", *"er", "enter")
            await until(lambda: len(app.store.tree(1)) == 3)
            await pilot.pause()
            assert told(app)[-1] == ("assistant", "The answer")
            assert "edited" in shown(app)  # the model has not said it so
            # As one that is taught: an example, and better than what the model had said.
            learned = [(pair.chosen, pair.rejected) for pair in app.store.pairs()]
            assert learned == [("The answer", None), ("The answer", "The answ")]
            await pilot.press("c")
            await answered(pilot)
            assert told(app)[-1] == ("assistant", "The answer is 42.")
            assert engine.asks[-1].continue_last
            assert engine.asks[-1].messages[-1] == {"role": "assistant", "content": "The answer"}
            assert app.store.message(2).content == "The answ"

    asyncio.run(run())


def test_answering_again_gives_a_sibling_and_siblings_can_be_compared_and_chosen():
    async def run() -> None:
        app = chat_app(FakeEngine(["One.", "Two."]))
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "Count")
            await answered(pilot)
            await pilot.press("ctrl+r")
            await answered(pilot)
            assert told(app)[-1] == ("assistant", "Two.")
            await pilot.press("ctrl+g", "v")
            await until(lambda: type(app.screen).__name__ == "SiblingsScreen")
            await pilot.pause()
            text = shown(app)
            assert "One." in text
            assert "Two." in text
            await pilot.press("left", "enter")
            await until(lambda: app.screen is app.chat_screen)
            await pilot.pause()
            assert told(app)[-1] == ("assistant", "One.")

    asyncio.run(run())


def test_removing_a_message_asks_first():
    async def run() -> None:
        app = chat_app()
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "one")
            await answered(pilot)
            await say(pilot, "two")
            await answered(pilot)
            await pilot.press("ctrl+g", "k", "x")
            await until(lambda: isinstance(app.screen, Confirm))
            await pilot.pause()
            assert "and the message that follows it" in shown(app)
            assert app.screen.styles.background.a < 1  # what it is about can be seen behind it
            await pilot.press("n")
            await pilot.pause()
            assert len(app.store.tree(1)) == 4
            await pilot.press("x")
            await until(lambda: isinstance(app.screen, Confirm))
            await pilot.press("y")
            await until(lambda: len(app.store.tree(1)) == 2)
            await until(lambda: app.screen is app.chat_screen)

    asyncio.run(run())


def test_the_tree_shows_every_branch_with_its_tokens_and_opens_one():
    async def run() -> None:
        engine = FakeEngine(lambda request: f"re: {request.messages[-1]['content']}")
        app = chat_app(engine)
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "root")
            await answered(pilot)
            await pilot.press("ctrl+t")
            await until(lambda: "2 messages in 1 branch " in shown(app))
            await pilot.press("escape")
            for text in ("left", "right"):
                app.store.edit_chat(1, head=2)
                await app.chat_screen.load()
                await say(pilot, text)
                await answered(pilot)
            await pilot.press("ctrl+t")
            await until(lambda: type(app.screen).__name__ == "TreeScreen")
            await until(lambda: "its own" in shown(app), "tokens are counted")
            text = shown(app)
            assert "6 messages in 2 branches" in text
            assert "shared with the open branch" in text
            await pilot.press("k", "k", "enter")
            await until(lambda: app.screen is app.chat_screen)
            await pilot.pause()
            assert ("user", "left") in told(app)

    asyncio.run(run())


def test_search_finds_a_message_of_a_branch_that_is_not_open_and_goes_there():
    async def run() -> None:
        store = Store(":memory:")
        chat = store.new_chat()
        root = store.add_message(chat.id, None, "user", "about whales")
        hidden = store.add_message(chat.id, root.id, "assistant", "the narwhal has a tusk")
        store.add_message(chat.id, root.id, "assistant", "whales are large")
        store.new_chat()
        app = chat_app(store=store)
        async with app.run_test(size=WIDE) as pilot:
            await until(lambda: app.ready)
            await pilot.press("ctrl+f", *"narw")
            await until(lambda: "1 messages" in shown(app), "the hit")
            await pilot.press("enter")
            await until(lambda: app.chat_id == chat.id, "the chat is open")
            await pilot.pause()
            chosen = app.chat_screen.transcript.chosen
            assert chosen is not None
            assert chosen.message.id == hidden.id
            await until(lambda: "narwhal" in shown(app))

    asyncio.run(run())


HOSTILE = (
    "\x1b[31mred\x1b[0m \x1b]8;;http://evil\x1b\\link\x1b]8;;\x07 [bold red]markup[/bold red] "
    "[@click=app.quit]quit[/] <script>alert(1)</script> [text](http://evil) &amp; $x_1$ \x9b2J "
)


def test_hostile_text_is_shown_as_text_wherever_it_stands():
    async def run() -> None:
        store = Store(":memory:")
        chat = store.new_chat(title=HOSTILE)
        store.edit_chat(chat.id, folder="[red]f[/]")
        root = store.add_message(chat.id, None, "user", HOSTILE, model=HOSTILE)
        store.add_message(chat.id, root.id, "assistant", HOSTILE, reasoning=HOSTILE, model=HOSTILE)
        store.add_message(chat.id, root.id, "assistant", HOSTILE)
        app = chat_app(FakeEngine(HOSTILE), store, resume=True)
        async with app.run_test(size=(200, 50)) as pilot:
            await until(lambda: app.ready and app.chat_screen.transcript.views)
            await pilot.pause()
            assert "\x1b" not in app.export_screenshot()
            text = shown(app)
            assert text.count("[bold red]markup[/bold red]") >= 3
            assert text.count("<script>") >= 2
            assert "[text](http://evil)" in text
            await say(pilot, HOSTILE)
            await answered(pilot)
            for keys, place in ((("ctrl+t",), "TreeScreen"), (("ctrl+f", *"markup"), "Search")):
                await pilot.press(*keys)
                await until(lambda place=place: place in type(app.screen).__name__)
                await until(lambda: "[bold red]markup" in shown(app))
                assert "\x1b" not in app.export_screenshot()
                await pilot.press("escape")
                await pilot.pause()
            await pilot.press("ctrl+g", "k", "x")
            await until(lambda: isinstance(app.screen, Confirm))
            await pilot.pause()
            assert "[bold red]markup" in shown(app)

    asyncio.run(run())


def test_code_has_its_language_and_is_copied_as_written():
    async def run() -> None:
        app = chat_app(FakeEngine("Look:\n\n```python\ndef f(x):\n    return x\n```\n"))
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "code")
            await answered(pilot)
            await until(lambda: app.screen.query(CodeBlock) and "python" in shown(app))
            await pilot.click("CopyCode")
            assert app.clipboard.strip() == "def f(x):\n    return x"

    asyncio.run(run())


def test_when_the_engine_dies_the_chat_stays_and_it_can_be_started_again():
    async def run() -> None:
        engine = FakeEngine("word " * 2000, delay=0.002)
        app = chat_app(engine)
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "Talk")
            await until(lambda: app.answers.live and app.answers.live[1].tokens > 5)
            engine.die("the engine was ended by SIGKILL")
            await answered(pilot)
            assert app.store.message(2).status == "failed"
            assert app.store.message(2).content.startswith("word word")
            assert app.screen.query_one(Banner).has_class("-shown")
            assert "SIGKILL" in shown(app)
            await pilot.click("#restart")
            await until(lambda: not app.screen.query_one(Banner).has_class("-shown"))
            engine.script, engine.delay = "Back.", 0
            await pilot.press("ctrl+r")
            await answered(pilot)
            assert told(app)[-1] == ("assistant", "Back.")

    asyncio.run(run())


def test_an_answer_that_the_engine_failed_at_says_why():
    async def run() -> None:
        app = chat_app(FakeEngine(fails=EngineGone("the engine failed: TypeError: no such step")))
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "Talk")
            await answered(pilot)
            assert told(app) == [("user", "Talk")]
            assert any("TypeError" in note.message for note in app._notifications)

    asyncio.run(run())


def test_what_is_being_typed_stays_with_its_chat_and_survives_the_app(tmp_path):
    async def run() -> None:
        path = tmp_path / "chats.db"
        store = Store(path)
        chat = store.new_chat(title="other")
        app = chat_app(store=store)
        async with app.run_test(size=WIDE) as pilot:
            await until(lambda: app.ready)
            await pilot.press(*"half a thought")
            await app.open_chat(chat.id)
            assert app.chat_screen.composer.text == ""
            await pilot.press(*"another")
            await app.open_chat(None)
            assert app.chat_screen.composer.text == "half a thought"
            await pilot.press("ctrl+q")
        store.close()
        with Store(path) as again:
            for opened, draft in ((chat.id, "another"), (False, "half a thought")):
                app = chat_app(store=again, resume=opened)
                async with app.run_test(size=WIDE) as pilot:
                    await until(lambda app=app: app.ready)
                    assert app.chat_screen.composer.text == draft

    asyncio.run(run())


def test_files_named_in_a_message_go_along_and_are_told_briefly(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("the secret is 7\n")
    monkeypatch.chdir(tmp_path)

    async def run() -> None:
        engine = FakeEngine()
        app = chat_app(engine)
        async with app.run_test(size=WIDE) as pilot:
            await until(lambda: app.ready)
            await pilot.press(*"see @no", "tab")
            assert app.chat_screen.composer.text == "see @notes.txt "
            await until(lambda: "tokens" in str(app.chat_screen.composer.border_title))
            await pilot.press("enter")
            await answered(pilot)
            assert "the secret is 7" in engine.asks[0].messages[-1]["content"]
            await until(lambda: "with notes.txt, 16 bytes" in shown(app))
            assert "the secret is 7" not in shown(app)
            await pilot.press(*"again @notes.txt", "enter")  # nothing is left to complete
            await until(lambda: len(engine.asks) == 2)
            await answered(pilot)
            await say(pilot, "and @missing.txt")
            assert len(engine.asks) == 2
            assert app.chat_screen.composer.text == "and @missing.txt"

    asyncio.run(run())


def test_slash_commands_complete_and_run():
    async def run() -> None:
        app = chat_app()
        async with app.run_test(size=WIDE) as pilot:
            await until(lambda: app.ready)
            await pilot.press(*"/them")
            assert "/theme" in shown(app)
            await pilot.press("tab", *"nor", "enter", "enter")
            await until(lambda: app.theme == "nord")
            await say(pilot, "/nonsense")
            assert app.chat_id is None
            await say(pilot, "/help")
            await until(lambda: type(app.screen).__name__ == "HelpScreen")

    asyncio.run(run())


def test_a_command_typed_faster_than_offers_are_shown_is_the_one_that_runs():
    async def run() -> None:
        app = chat_app()
        async with app.run_test(size=WIDE) as pilot:
            await until(lambda: app.ready)
            await pilot.press("/")
            assert "/adapter" in shown(app)
            app.chat_screen.composer.insert("help")
            app.chat_screen.composer.post_message(events.Key("enter", None))
            await until(lambda: type(app.screen).__name__ == "HelpScreen")

    asyncio.run(run())


def test_keys_of_the_file_take_the_place_of_the_defaults(tmp_path):
    (tmp_path / "keys.toml").write_text('tree = "ctrl+y"\nsearch = "enter"\n')

    async def run() -> None:
        app = chat_app(config=tmp_path)
        async with app.run_test(size=WIDE) as pilot:
            await until(lambda: app.ready)
            assert any("needed for typing" in told.message for told in app._notifications)
            await say(pilot, "hello")
            await answered(pilot)
            await pilot.press("ctrl+t")
            await pilot.pause()
            assert app.screen is app.chat_screen
            await pilot.press("ctrl+y")
            await until(lambda: type(app.screen).__name__ == "TreeScreen")

    asyncio.run(run())


def test_chats_are_renamed_pinned_filed_and_deleted_from_the_list():
    async def run() -> None:
        store = Store(":memory:")
        for number in range(300):
            store.new_chat(title=f"chat {number}")
        app = chat_app(store=store)
        async with app.run_test(size=WIDE) as pilot:
            await until(lambda: app.ready)
            await pilot.press("ctrl+l", "G")
            chats = app.chat_screen.chats
            assert chats.chosen is not None
            oldest = chats.chosen.id
            assert chats.chosen.title == "chat 0"
            await pilot.press("p")
            assert store.chat(oldest).pinned
            assert store.chats(limit=1)[0].id == oldest
            await pilot.press("g", "r")
            await until(lambda: type(app.screen).__name__ == "AskText")
            await pilot.press(*"renamed", "enter")
            await until(lambda: store.chat(oldest).title == "renamed")
            await until(lambda: app.screen is app.chat_screen)
            await pilot.press("enter")
            await until(lambda: app.chat_id == oldest)
            await say(pilot, "/folder work")
            await say(pilot, "/tag red blue")
            assert store.chat(oldest).folder == "work"
            assert store.tags(oldest) == ("blue", "red")
            await say(pilot, "/find folder:work #red")
            await until(lambda: chats.count == 1)
            await pilot.press("enter", "x")
            await until(lambda: isinstance(app.screen, Confirm))
            await pilot.press("y")
            await until(lambda: store.count_chats() == 299)
            await until(lambda: app.chat_id is None)

    asyncio.run(run())


def told_of(view: MessageView | None) -> str:
    return "" if view is None else view.message.content


async def walk(transcript: Transcript, by: int, steps: int) -> None:
    for _ in range(steps):
        before = transcript.chosen
        await transcript.move(by)
        await until(lambda before=before: transcript.chosen not in (before, None))


def test_the_line_of_the_open_chat_is_marked_when_others_come_above_it():
    async def run() -> None:
        app = chat_app()
        async with app.run_test(size=WIDE) as pilot:
            for text in ("first", "second", "third"):
                await pilot.press("ctrl+n")
                await say(pilot, text)
                await answered(pilot)
                chosen = app.chat_screen.chats.chosen
                assert chosen is not None
                assert chosen.id == app.chat_id
            await pilot.press("ctrl+l", "j", "j")
            app.chat_screen.chats.reload()
            chosen = app.chat_screen.chats.chosen
            assert chosen is not None
            assert chosen.title == "first"  # while one moves there, it stays

    asyncio.run(run())


def test_a_long_chat_mounts_its_end_and_older_messages_when_they_are_reached():
    async def run() -> None:
        store = Store(":memory:")
        chat = store.new_chat()
        parent = None
        for number in range(400):
            role = "assistant" if number % 2 else "user"
            parent = store.add_message(chat.id, parent, role, f"message {number}").id
        app = chat_app(store=store, resume=chat.id)
        async with app.run_test(size=WIDE) as pilot:
            await until(lambda: app.chat_screen.transcript.views)
            await pilot.pause()
            transcript = app.chat_screen.transcript
            assert len(transcript.views) < 30
            assert "message 399" in shown(app)
            await pilot.press("ctrl+g")
            await walk(transcript, -1, 14)
            await until(lambda: told_of(transcript.chosen) == "message 385")
            # An end is reached at once, and from there the messages beside it.
            await pilot.press("g")
            await until(lambda: "message 0" in shown(app))
            assert len(transcript.views) < 30
            await until(lambda: told_of(transcript.chosen) == "message 0")
            await walk(transcript, 1, 14)
            await until(lambda: told_of(transcript.chosen) == "message 14")
            await app.chat_screen.load()
            assert told_of(transcript.chosen) == "message 14"
            await pilot.press("G")
            await until(lambda: "message 399" in shown(app))
            await until(lambda: told_of(transcript.chosen) == "message 399")
            await pilot.press("g")
            await until(lambda: "message 0" in shown(app))
            await say(pilot, "And now?")
            await answered(pilot)
            await until(lambda: "A short answer." in shown(app))
            assert len(transcript.views) < 30

    asyncio.run(run())


@pytest.mark.parametrize("size", [(60, 20), (120, 40)])
def test_the_list_of_chats_lies_over_a_narrow_chat_and_beside_a_wide_one(size):
    async def run() -> None:
        store = Store(":memory:")
        chat = store.new_chat(title="a chat")
        app = chat_app(store=store)
        async with app.run_test(size=size) as pilot:
            await until(lambda: app.ready)
            await pilot.pause()
            wide = size[0] > 90
            assert app.chat_screen.sidebar_shown is wide
            assert app.screen.query_one("#main").size.width >= size[0] - (31 if wide else 0)
            await pilot.press("ctrl+l")
            await pilot.pause()
            assert "a chat" in shown(app)
            await pilot.press("enter")
            await until(lambda: app.chat_id == chat.id)
            assert app.chat_screen.sidebar_shown is wide

    asyncio.run(run())


def test_the_model_names_a_chat_after_its_first_answer_but_never_one_named_by_the_user():
    async def run() -> None:
        engine = FakeEngine(lambda r: "Sky Colours" if "title" in str(r.messages) else "Light.")
        app = chat_app(engine, settings=Settings(titles=True))
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "Why is the sky blue?")
            await answered(pilot)
            await until(lambda: app.chat.title == "Sky Colours")
            await say(pilot, "/rename Mine")
            await say(pilot, "/new Why is the grass green?")
            await answered(pilot)
            await until(lambda: app.chat.titled == 2)
            assert app.store.chat(1).title == "Mine"

    asyncio.run(run())


def test_a_hundred_thousand_characters_are_pasted_sent_and_shown_folded():
    async def run() -> None:
        from textual.events import Paste

        engine = FakeEngine()
        app = chat_app(engine)
        async with app.run_test(size=(110, 60)) as pilot:
            await until(lambda: app.ready)
            text = "line of pasted text\n" * 5000
            app.chat_screen.composer.post_message(Paste(text))
            await until(lambda: len(app.chat_screen.composer.text) == len(text))
            await pilot.press("enter")
            await answered(pilot)
            assert engine.asks[0].messages[-1]["content"] == text
            app.chat_screen.transcript.choose_last("user")
            await until(lambda: "more characters" in shown(app))

    asyncio.run(run())


def test_thinking_is_folded_and_opens():
    async def run() -> None:
        store = Store(":memory:")
        chat = store.new_chat()
        root = store.add_message(chat.id, None, "user", "2+2")
        store.add_message(chat.id, root.id, "assistant", "4", reasoning="two and two are four")
        app = chat_app(store=store, resume=True)
        async with app.run_test(size=WIDE) as pilot:
            await until(lambda: app.ready and app.chat_screen.transcript.views)
            await pilot.press("ctrl+g")
            await pilot.pause()
            assert "Thinking · 5 words" in shown(app)
            assert "two and two" not in shown(app)
            await pilot.press("o")
            await until(lambda: "two and two are four" in shown(app))

    asyncio.run(run())


@pytest.mark.parametrize("opened", [False, True])
def test_thinking_is_shown_while_it_comes(opened):
    async def run() -> None:
        engine = FakeEngine("It is four.", thinks="two and two are four", delay=0.1)
        app = chat_app(engine, settings=Settings(thinking_open=opened))
        async with app.run_test(size=WIDE) as pilot:
            await until(lambda: app.ready)
            await pilot.press(*"2+2", "enter")
            await until(lambda: "Thinking · " in shown(app))
            assert app.answers.live
            await answered(pilot)
            await until(lambda: "Thinking · 5 words" in shown(app))
            assert ("two and two are four" in shown(app)) == opened
            assert "It is four." in shown(app)

    asyncio.run(run())


def test_the_palette_holds_every_command_of_the_place():
    async def run() -> None:
        app = chat_app()
        async with app.run_test(size=WIDE) as pilot:
            await until(lambda: app.ready)
            await pilot.press("ctrl+p", *"vim")
            await until(lambda: "App: Vim keys" in shown(app))
            await pilot.pause(0.3)
            await pilot.press("enter")
            await until(lambda: app.settings.vim)

    asyncio.run(run())


@pytest.mark.parametrize("gone", ["#title", "#transcript", "#queue"])
def test_an_answer_that_ends_while_the_app_is_left_breaks_nothing(gone):
    """The parts of a screen go one by one, and the answer's end finds some of them gone."""

    async def run() -> None:
        app = chat_app(FakeEngine("Never to be read."))
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "Why?")
            await answered(pilot)
            await app.screen.query_one(gone).remove()
            await app.chat_screen.load()

    asyncio.run(run())


def test_a_new_chat_begins_with_the_parameters_kept_for_new_ones():
    async def run() -> None:
        store = Store(":memory:")
        store.set_setting(NEW_CHATS, {"top_k": 3, "temperature": 0.2})
        app = chat_app(FakeEngine("Yes."), store, params={"temperature": 0.9})
        async with app.run_test(size=WIDE) as pilot:
            await say(pilot, "Are you there?")
            await answered(pilot)
            assert app.chat is not None
            assert app.chat.params == {"top_k": 3}
            asked = app.engine.asks[0].params  # type: ignore[attr-defined]
            assert (asked["top_k"], asked["temperature"]) == (3, 0.9)

    asyncio.run(run())
