"""The frame before the app's own."""

from __future__ import annotations

import asyncio

import pytest

from localllm.tui.first_frame import box
from localllm.tui.settings import Settings
from tests.tui.app_host import chat_app, until

pyte = pytest.importorskip("pyte")


@pytest.mark.parametrize(
    ("columns", "lines", "sidebar"), [(110, 34, True), (110, 30, False), (60, 20, True)]
)
def test_its_box_is_where_the_app_has_its_own(columns: int, lines: int, sidebar: bool) -> None:
    screen = pyte.Screen(columns, lines)
    pyte.Stream(screen).feed(box(columns, lines, sidebar=sidebar))
    corners = {
        (x, y) for y in range(lines) for x in range(columns) if screen.buffer[y][x].data in "╭╮╰╯"
    }
    cursor = (screen.cursor.x, screen.cursor.y)

    async def composer() -> tuple[set[tuple[int, int]], tuple[int, int]]:
        app = chat_app(settings=Settings(titles=False, sidebar=sidebar))
        async with app.run_test(size=(columns, lines)):
            await until(lambda: app.ready)
            found = app.chat_screen.composer
            x, y, width, height = found.region
            right, bottom = x + width - 1, y + height - 1
            return {(x, y), (right, y), (x, bottom), (right, bottom)}, found.content_region.offset

    where, text = asyncio.run(composer())
    assert corners == where
    assert cursor == text


@pytest.mark.parametrize(("columns", "lines"), [(12, 3), (1, 1)])
def test_it_breaks_nothing_on_the_smallest_screens(columns: int, lines: int) -> None:
    assert "╭" in box(columns, lines, sidebar=True)
