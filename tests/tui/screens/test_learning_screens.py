"""Dataset, adapters, fine-tuning and teaching, as a person meets them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from textual.widgets import OptionList, Select, Static, TextArea

from localllm.tui.finetune_job import Jobs
from localllm.tui.screens.adapters import KNOWN, AdaptersScreen
from localllm.tui.screens.compare import CompareScreen
from localllm.tui.screens.dataset import DatasetScreen
from localllm.tui.screens.finetune import FinetuneScreen
from localllm.tui.screens.learning import TeachScreen
from localllm.tui.widgets.confirm import AskText
from localllm.tui.widgets.fields import Field
from localllm.tui.widgets.footer import KeyLine
from localllm.tui.widgets.sparkline import Plot
from localllm.tui.widgets.table import Table
from tests.tui.fake_engine import FakeEngine
from tests.tui.test_finetune_job import STAND_IN
from tests.tui.view_host import HostApp, run, until

PROMPT = [{"role": "user", "content": "Why [red]blue[/red]?"}]


def shown_keys(app: HostApp) -> list[str]:
    """Of the last line, in its order."""
    return [binding.key for binding in app.screen.query_one(KeyLine)._bindings_shown]


def with_pairs(*screen) -> HostApp:
    host = HostApp(FakeEngine(), *screen)
    chat = host.with_chat("Why?", "Because.")
    host.store.add_pair(PROMPT, "Good [b]one[/b].", "Bad one.", "rating", chat)
    host.store.add_pair(PROMPT, "good  [b]one[/b].", "Bad one.", "compare", chat)
    host.store.add_pair(PROMPT, "Written by hand.", None, "edit", chat)
    return host


class TestDataset:
    @pytest.fixture
    def app(self):
        return with_pairs(DatasetScreen())

    @staticmethod
    def text(app: HostApp) -> str:
        return str(app.screen.query_one("#text", Static).content)

    def test_pairs_and_examples_are_shown_as_text(self, app):
        @run()
        async def drive(app, pilot):
            assert app.screen.query_one(Table).row_count == 3
            assert "Good [b]one[/b]." in self.text(app)
            assert "rather than" in self.text(app)
            await pilot.press("j", "j")
            assert "Written by hand." in self.text(app)
            assert "rather than" not in self.text(app)

        drive(app)

    def test_questions_and_answers_have_the_same_room(self, app):
        @run(size=(100, 30))
        async def drive(app, pilot):
            kind, origin, asked, _ = app.screen.query_one(Table).ordered_columns
            left = app.screen.query_one(Table).size.width
            left -= sum(one.get_render_width(app.screen.query_one(Table)) for one in (kind, origin))
            assert abs(left - 2 * asked.get_render_width(app.screen.query_one(Table))) <= 2

        drive(app)

    def test_one_is_deleted_after_asking(self, app):
        @run()
        async def drive(app, pilot):
            await pilot.press("d")
            await pilot.pause()
            await pilot.press("y")
            await until(pilot, lambda: len(app.store.pairs()) == 2)

        drive(app)

    def test_doubles_go(self, app):
        @run()
        async def drive(app, pilot):
            await pilot.press("u")
            await pilot.pause()
            await pilot.press("y")
            await until(pilot, lambda: len(app.store.pairs()) == 2)
            assert [pair.origin for pair in app.store.pairs()] == ["rating", "edit"]

        drive(app)

    def test_words_narrow_the_list(self, app):
        @run()
        async def drive(app, pilot):
            await pilot.press("slash", *"hand")
            await pilot.pause()
            assert app.screen.query_one(Table).row_count == 1
            assert "Written by hand." in self.text(app)

        drive(app)

    def test_it_is_exported(self, app, tmp_path):
        @run()
        async def drive(app, pilot):
            await pilot.press("e")
            await until(pilot, lambda: isinstance(app.screen, AskText))
            app.screen.dismiss(str(tmp_path / "out"))
            await until(pilot, lambda: (tmp_path / "out" / "examples.jsonl").exists())

        drive(app)
        assert len((tmp_path / "out" / "pairs.jsonl").read_text().splitlines()) == 2


class TestAdapters:
    @pytest.fixture
    def app(self, tmp_path):
        host = HostApp(FakeEngine(), AdaptersScreen(Jobs(tmp_path)))
        host.with_chat("Why?", "Because.")
        host.store.set_setting(KNOWN, ["/adapters/poet", "/adapters/missing"])
        return host

    def test_one_is_turned_on_weighed_and_off(self, app):
        @run()
        async def drive(app, pilot):
            def chat():
                return app.store.chat(app.chat_id)

            await pilot.press("enter")
            await until(pilot, lambda: chat().adapter == "/adapters/poet")
            assert app.engine.loaded == ["/adapters/poet"]
            await pilot.press("w")
            await pilot.pause()
            await pilot.press("home", "ctrl+k", *"0.5", "enter")
            await until(pilot, lambda: chat().adapter_weight == 0.5)
            await pilot.press("enter")
            await until(pilot, lambda: chat().adapter is None)

        drive(app)

    def test_one_that_cannot_be_loaded_is_never_the_chats(self, app):
        @run()
        async def drive(app, pilot):
            await pilot.press("j", "enter")
            await until(pilot, lambda: bool(app._notifications))
            assert app.store.chat(app.chat_id).adapter is None

        drive(app)

    def test_a_weight_that_is_none_is_refused(self, app):
        @run()
        async def drive(app, pilot):
            for told, typed in enumerate(("9", "nan", "much"), 1):
                await pilot.press("w")
                await pilot.pause()
                await pilot.press("home", "ctrl+k", *typed, "enter")
                await until(pilot, lambda told=told: len(app._notifications) == told)
                assert app.store.chat(app.chat_id).adapter_weight == 1.0

        drive(app)

    def test_before_and_after_is_one_key(self, app):
        @run()
        async def drive(app, pilot):
            await pilot.press("b")
            await until(pilot, lambda: isinstance(app.screen, CompareScreen))
            await until(pilot, lambda: len(app.engine.asks) == 2)
            adapters = [request.adapter for request in app.engine.asks]
            assert adapters == [None, "/adapters/poet"]

        drive(app)


class TestFinetune:
    @pytest.fixture
    def jobs(self, tmp_path):
        script = tmp_path / "stand_in.py"
        script.write_text(STAND_IN)
        made = Jobs(tmp_path / "home", (sys.executable, str(script)))
        yield made
        for job in made.all():
            job.cancel()

    @pytest.fixture
    def app(self, jobs):
        return with_pairs(FinetuneScreen(jobs))

    def test_a_run_is_started_from_the_pairs_and_its_adapter_used(self, app, jobs):
        @run(size=(120, 40))
        async def drive(app, pilot):
            app.screen.query_one("#f-steps", Field).value = "6"
            await pilot.pause()
            await pilot.press("ctrl+s")
            await until(pilot, lambda: len(jobs.all()) == 1)
            (job,) = jobs.all()
            words = job.command
            given = {
                name: words[words.index(name) + 1]
                for name in words
                if name[:2] == "--" and name != "--json"
            }
            assert given["--method"] == "dpo"
            assert given["--model"] == "smollm2:135m"
            assert given["--sample-prompt"] == "Why?"
            data = Path(given["--data"]).read_text().splitlines()
            assert [json.loads(line)["rejected"][0]["content"] for line in data] == ["Bad one."] * 2
            await until(pilot, lambda: job.status() == "finished", 20)
            app.screen._read_jobs()
            await pilot.pause()
            (loss,) = app.screen.query_one(Plot).series
            assert [step for step, _ in loss.points] == [1, 2, 3, 4, 5, 6]
            facts = str(app.screen.query_one("#facts", Static).content)
            assert "finished" in facts
            assert "step 6 of 6, loss 0.5" in facts
            await pilot.press("ctrl+l")
            await until(pilot, lambda: app.store.chat(app.chat_id).adapter == str(job.out))
            await pilot.press("ctrl+b")
            await until(pilot, lambda: isinstance(app.screen, CompareScreen))

        drive(app)

    def test_a_run_of_before_is_shown_again_and_stopped(self, app, jobs):
        job = jobs.start([{"messages": []}], {"steps": "2000"})

        @run()
        async def drive(app, pilot):
            options = app.screen.query_one("#runs", OptionList)
            await until(pilot, lambda: options.option_count == 1)
            await until(pilot, lambda: bool(job.metrics()))
            await pilot.press("ctrl+x")
            await pilot.pause()
            await pilot.press("y")
            await until(pilot, lambda: job.status() == "interrupted", 20)

        drive(app)

    def test_a_run_that_was_stopped_goes_on(self, app, jobs):
        job = jobs.start([{"messages": []}], {"steps": "2000"})

        @run()
        async def drive(app, pilot):
            # The footer follows what can be done at its next drawing.
            await until(pilot, lambda: shown_keys(app)[:3] == ["escape", "ctrl+s", "ctrl+x"])
            job.cancel()
            await until(pilot, lambda: "resume" in app.screen._can, 20)
            await until(pilot, lambda: "ctrl+x" not in shown_keys(app))
            await pilot.press("ctrl+r")
            await until(pilot, lambda: job.status() == "finished", 20)

        drive(app)

    def test_with_no_run_nothing_of_one_is_offered(self, app):
        @run()
        async def drive(app, pilot):
            options = app.screen.query_one("#runs", OptionList)
            assert [str(option.prompt) for option in options.options] == ["none yet"]
            keys = shown_keys(app)
            assert "ctrl+s" in keys
            assert not {"ctrl+x", "ctrl+r", "ctrl+l", "ctrl+b"} & set(keys)
            assert not app.screen.query_one(Plot).display

        drive(app)

    def test_an_adapter_is_used_where_there_is_no_chat_yet(self, app, jobs):
        job = jobs.start([{"messages": []}], {"steps": "1"})

        @run()
        async def drive(app, pilot):
            app.chat_id = None
            await until(pilot, lambda: "use" in app.screen._can, 20)
            await pilot.press("ctrl+l")
            await until(pilot, lambda: app.chat_id is not None)
            assert app.store.chat(app.chat_id).adapter == str(job.out)

        drive(app)

    def test_good_answers_are_counted_as_they_are_written(self, app):
        @run()
        async def drive(app, pilot):
            # The pair's and the example's good answer are one here, and so are both of a pair.
            app.store.add_pair(PROMPT, "Written by hand.", "Worse.", "edit", app.chat_id)
            screen = FinetuneScreen(app.screen._runs)
            await app.push_screen(screen)
            names = [str(name) for name, _ in screen.query_one("#source", Select)._options]
            assert names == ["3 preference pairs", "3 good answers", "a file"]

        drive(app)

    def test_every_choice_can_be_seen_and_what_a_field_is_is_said_in_whole(self, app):
        @run()
        async def drive(app, pilot):
            await pilot.press("down")
            await pilot.pause()
            overlay = app.screen.query_one("#source SelectOverlay")
            assert overlay.size.height >= 3
            await pilot.press("escape", "tab", "tab")
            await pilot.pause()
            hint = str(app.screen.query_one("#hint", Static).content)
            assert hint == "JSONL, JSON, CSV or Parquet; only for data from a file"

        drive(app)

    def test_the_keys_keep_their_order_where_a_field_has_one_of_them(self, app, jobs):
        jobs.start([{"messages": []}], {"steps": "2000"})

        @run()
        async def drive(app, pilot):
            await until(pilot, lambda: "stop" in app.screen._can)
            before = shown_keys(app)
            await pilot.press("tab", "tab")
            await pilot.pause()
            assert shown_keys(app) == before

        drive(app)

    def test_what_cannot_be_an_option_starts_nothing(self, app, jobs):
        wrong = [("steps", "many"), ("lr", "slow"), ("more", "rm -rf"), ("more", "'")]

        @run()
        async def drive(app, pilot):
            for told, (name, typed) in enumerate(wrong, 1):
                field = app.screen.query_one(f"#f-{name}", Field)
                before, field.value = field.value, typed
                await pilot.pause()
                await pilot.press("ctrl+s")
                await until(pilot, lambda told=told: len(app._notifications) == told)
                assert jobs.all() == []
                field.value = before
                await pilot.pause()

        drive(app)

    def test_good_answers_are_learned_by_imitation_and_a_file_must_be_named(self, app, jobs):
        @run()
        async def drive(app, pilot):
            app.screen.query_one("#source", Select).value = "examples"
            await pilot.pause()
            assert app.screen.query_one("#method", Select).value == "sft"
            app.screen.query_one("#source", Select).value = "a file"
            await pilot.pause()
            await pilot.press("ctrl+s")
            await until(pilot, lambda: bool(app._notifications))
            assert jobs.all() == []

        drive(app)


class TestTeaching:
    def test_the_answer_is_written_anew(self):
        app = with_pairs()
        kept: list[str | None] = []

        @run()
        async def drive(app, pilot):
            message = app.store.tree(app.chat_id)[1]
            await app.push_screen(TeachScreen(message), kept.append)
            await pilot.pause()
            assert app.screen.query_one(TextArea).text == "Because."
            await pilot.press("end", *" Air.", "ctrl+s")
            await pilot.pause()
            await app.push_screen(TeachScreen(message), kept.append)
            await pilot.pause()
            await pilot.press("x", "escape")
            await pilot.pause()

        drive(app)
        assert kept == ["Because. Air.", None]
