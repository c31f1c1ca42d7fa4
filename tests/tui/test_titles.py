from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.tui.engine.client import EngineGone
from localllm.tui.text import one_line
from localllm.tui.titles import MOST_WORDS, clean_title, make_title, title_of
from tests.tui.conftest import SharedEngine
from tests.tui.fake_engine import FakeEngine


@pytest.mark.parametrize(
    ("written", "title"),
    [
        ("Sorting lists in Python", "Sorting lists in Python"),
        ('Title: "Sorting Lists"', "Sorting Lists"),
        ("**Sorting lists.**\nThis title names", "Sorting lists"),
        ("# Tides\n", "Tides"),
        ("\n\n- Topic - The moon", "The moon"),
        ("One two three four five six seven eight", "One two three four five six"),
        ("A short introduction to the history of the world", "A short introduction to the history"),
        ("\x1b[31mRed\x1b[0m \u202etides", "Red tides"),
        ("...", ""),
        ('```json {"type": "json"}```', ""),
        ("```python\nprint(1)\n```", ""),
        ('{"title": 1}', ""),
        ("", ""),
    ],
)
def test_what_a_model_writes_becomes_a_title(written, title):
    assert clean_title(written) == title


@given(st.text(max_size=300))
def test_a_title_is_short_and_safe_whatever_was_written(text):
    for title in (clean_title(text), title_of(text)):
        assert len(title.split()) <= MOST_WORDS
        assert len(title) <= 48
        assert title == one_line(title)


def test_a_first_message_gives_a_title_of_its_own():
    assert title_of("How do tides work? I want to know.") == "How do tides work"
    assert title_of("```\n") == ""


def test_the_first_messages_beginning_is_used_where_the_model_says_nothing_of_use():
    assert asyncio.run(make_title(FakeEngine("...\n"), "Why is the sea salt?", "Rivers.")) == (
        "Why is the sea salt"
    )


def test_a_long_chat_is_shown_in_part_and_stopped_at_the_first_line():
    engine = FakeEngine("Salt\nand more and more and more")
    assert asyncio.run(make_title(engine, "x" * 100_000, "y" * 100_000)) == "Salt"
    assert len(engine.asks[0].messages[0]["content"]) < 2000
    engine.die()
    with pytest.raises(EngineGone):
        asyncio.run(make_title(engine, "q", "a"))


def test_the_real_model_names_a_chat(real_engine: SharedEngine):
    question, answer = "Why is the sea salt?", "Rivers carry minerals from rocks into the sea."
    title = real_engine.run(lambda engine: make_title(engine, question, answer))
    assert title
    assert len(title.split()) <= MOST_WORDS
