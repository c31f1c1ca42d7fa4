"""An answer that grows is laid out once for each time it is drawn."""

from __future__ import annotations

import asyncio

from textual.screen import Screen

from localllm.tui.widgets.markdown import AnswerMarkdown
from localllm.tui.widgets.transcript import Transcript
from tests.tui.app_host import answered, chat_app, say, shown
from tests.tui.fake_engine import FakeEngine

WORDS = "and some more words of it " * 8


def test_a_growing_answer_is_laid_out_once_and_fills_its_place(monkeypatch):
    layouts = []
    layout = Screen._refresh_layout

    def counted(self: Screen, *args: object, **options: object) -> None:
        layouts.append(self)
        layout(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Screen, "_refresh_layout", counted)

    async def run() -> None:
        app = chat_app(FakeEngine("A first paragraph.\n\n- a point"))
        async with app.run_test(size=(100, 30)) as pilot:
            await say(pilot, "hello")
            await answered(pilot)
            await pilot.pause(0.3)
            markdown = app.query(AnswerMarkdown).last()
            for more in (" and more of it\n- another\n\n", *[WORDS] * 6):
                await markdown.append(more)
                await pilot.pause(0.2)
                layouts.clear()
            for more in (WORDS, f"{WORDS}\n\n{WORDS}\n\n## A title\n\n{WORDS}END"):
                layouts.clear()
                await markdown.append(more)
                await pilot.pause(0.2)
                assert len(layouts) == 1
            assert "END" in shown(app)
            transcript = app.query_one(Transcript)
            assert transcript.virtual_size.height > transcript.size.height
            assert transcript.show_vertical_scrollbar
            assert transcript.is_vertical_scroll_end

    asyncio.run(run())
