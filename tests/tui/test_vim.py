"""Vim's basics where one types."""

from __future__ import annotations

import asyncio

from localllm.tui.settings import Settings
from tests.tui.app_host import chat_app, told, until

TEXT = "one two three\nfour five\nsix"


CASES = [
    (["w"], TEXT, (0, 4)),
    (["2", "w"], TEXT, (0, 8)),
    (["e"], TEXT, (0, 2)),
    (["G", "b"], TEXT, (1, 5)),
    (["$"], TEXT, (0, 12)),
    (["G"], TEXT, (2, 0)),
    (["2", "G"], TEXT, (1, 0)),
    (["j", "j", "g", "g"], TEXT, (0, 0)),
    (["d", "w"], "two three\nfour five\nsix", (0, 0)),
    (["2", "d", "w"], "three\nfour five\nsix", (0, 0)),
    (["d", "d"], "four five\nsix", (0, 0)),
    (["2", "d", "d"], "six", (0, 0)),
    (["G", "d", "d"], "one two three\nfour five", (1, 0)),
    (["w", "D"], "one \nfour five\nsix", (0, 4)),
    (["x"], "ne two three\nfour five\nsix", (0, 0)),
    (["d", "d", "p"], "four five\none two three\nsix", (1, 0)),
    (["y", "y", "P"], "one two three\n" + TEXT, (0, 0)),
    (["c", "w", *"new"], "new two three\nfour five\nsix", (0, 3)),
    (["A", *"!"], "one two three!\nfour five\nsix", (0, 14)),
    (["o", *"x"], "one two three\nx\nfour five\nsix", (1, 1)),
    (["O", *"x"], "x\n" + TEXT, (0, 1)),
    (["J"], "one two three four five\nsix", None),
    (["d", "d", "u"], TEXT, None),
    (["3", "escape", "x"], "ne two three\nfour five\nsix", (0, 0)),
]


def test_keys_of_normal_mode():
    async def run() -> None:
        app = chat_app(settings=Settings(vim=True, titles=False))
        async with app.run_test(size=(80, 24)) as pilot:  # one for all: starting takes longest
            await until(lambda: app.ready)
            composer = app.chat_screen.composer
            for keys, text, cursor in CASES:
                composer.use_vim(True)
                composer.put(TEXT)
                composer.move_cursor((0, 0))
                await pilot.press("escape", *keys)
                assert composer.text == text, keys
                if cursor is not None:
                    assert composer.cursor_location == cursor, keys

    asyncio.run(run())


def test_insert_mode_types_and_enter_sends_in_both():
    async def run() -> None:
        app = chat_app(settings=Settings(vim=True, titles=False))
        async with app.run_test(size=(80, 24)) as pilot:
            await until(lambda: app.ready)
            await pilot.press(*"dd", "enter")
            await until(lambda: app.chat_id is not None and not app.answers.live)
            await pilot.press(*"more", "escape", "enter")
            await until(lambda: len(told(app)) == 4)
            assert [text for role, text in told(app) if role == "user"] == ["dd", "more"]

    asyncio.run(run())
