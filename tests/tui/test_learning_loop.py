"""From ratings to a better answer, nothing faked: pairs, a real run, its adapter in the chat."""

from __future__ import annotations

import asyncio

import pytest

from localllm.tui.engine.remote import RemoteEngine
from localllm.tui.finetune_job import Jobs
from localllm.tui.screens.compare import Column, CompareScreen
from localllm.tui.screens.finetune import FinetuneScreen
from localllm.tui.widgets.fields import Field
from tests.tui.view_host import HostApp, until

ASKED = "Name the capital of Freedonia."


@pytest.mark.slow
def test_what_was_taught_is_answered_after_training(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALLLM_HOME", str(tmp_path))
    jobs = Jobs(tmp_path)

    async def all_of_it() -> None:
        engine = RemoteEngine()
        app = HostApp(engine)
        chat = app.with_chat(ASKED, "I do not know.")
        app.store.edit_chat(chat, params={"temperature": 0, "max_tokens": 16})
        for name in ("Ann", "Ben", "Cleo", "Dan"):
            prompt = [{"role": "user", "content": f"{name} asks: {ASKED}"}]
            app.store.add_pair(prompt, "It is Zubrowka.", None, "edit", chat)
        app.store.add_pair([{"role": "user", "content": ASKED}], "It is Zubrowka.", None, "edit")
        try:
            await engine.open(str(smollm2))
            async with app.run_test(size=(120, 40)) as pilot:
                await app.push_screen(FinetuneScreen(jobs))
                await pilot.pause()
                for name, value in (("steps", "20"), ("lr", "1e-3"), ("seq-len", "128")):
                    app.screen.query_one(f"#f-{name}", Field).value = value
                await pilot.press("ctrl+s")
                await until(pilot, lambda: len(jobs.all()) == 1)
                (job,) = jobs.all()
                await until(pilot, lambda: job.status() != "running", 300)
                assert job.status() == "finished", job.log_tail()
                steps = [line["loss"] for line in job.metrics() if line["type"] == "step"]
                assert len(steps) == 20
                assert steps[-1] < steps[0] / 4
                await until(pilot, lambda: bool(app.screen.check_action("use", ())))
                await pilot.press("ctrl+l")
                await until(pilot, lambda: app.store.chat(chat).adapter == str(job.out), 30)
                await pilot.press("ctrl+b")
                await until(pilot, lambda: isinstance(app.screen, CompareScreen))
                screen = app.screen
                await until(pilot, lambda: len(screen._answers) == 2)
                await until(pilot, lambda: all(one.receipt for one in screen._answers), 60)
                before, after = (answer.text for answer in screen._answers)
                assert "Zubrowka" not in before
                assert "Zubrowka" in after
                assert len(app.screen.query(Column)) == 2
        finally:
            await engine.close()

    asyncio.run(all_of_it())
