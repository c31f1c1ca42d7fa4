"""A long table is shown whole, and quickly."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from textual.app import App, ComposeResult

from localllm.tui.widgets.long_table import LongTable, as_lines
from localllm.tui.widgets.markdown import AnswerMarkdown

CELLS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]) | st.just(" "))
ROWS = st.lists(st.lists(CELLS, max_size=4), max_size=6)


@given(headers=st.lists(CELLS, min_size=1, max_size=3), rows=ROWS)
def test_every_character_is_there_in_lines_of_one_width(headers, rows):
    lines = as_lines(headers, rows)
    shown = "".join(lines)
    for cell in (c for row in (headers, *rows) for c in row):
        for letter in cell.replace(" ", ""):
            assert letter in shown
    assert len({cell_len(line) for line in lines}) == 1


def row(number: int) -> str:
    return f"| row {number} | **{number * number}** | what is said of it, again and again |\n"


def test_one_that_grows_while_it_comes_becomes_one_widget_and_loses_nothing():
    class Page(App[None]):
        def compose(self) -> ComposeResult:
            yield AnswerMarkdown()

    async def run() -> None:
        app = Page()
        async with app.run_test(size=(100, 30)) as pilot:
            markdown = app.query_one(AnswerMarkdown)
            await markdown.append("| name | square | text |\n| --- | --- | --- |\n" + row(1))
            await pilot.pause()
            assert not app.query(LongTable)  # a small one has cells that wrap, as Textual has it
            for start in range(2, 202, 40):
                await markdown.append("".join(map(row, range(start, start + 40))))
            await pilot.pause()
            whole = str(app.query_one(LongTable).content)
            assert all(f"row {n} " in whole and f" {n * n} " in whole for n in range(1, 202))
            assert len(markdown.query("*")) < 10
            await markdown.append("\nThat was all.\n")
            await pilot.pause()
            assert str(app.query_one(LongTable).content) == whole

    asyncio.run(run())
