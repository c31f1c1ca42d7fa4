"""Text of others: nothing in it commands the terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.tui.text import one_line, plain

_HOSTILE = st.text(
    st.one_of(
        st.characters(max_codepoint=0xFF),
        st.sampled_from("\x1b[]m0;\x07\x9b\x9c\x90\u202e\u2066ab \n\t\r"),
        st.characters(exclude_categories=["Cs"]),
    )
)


@given(_HOSTILE)
def test_no_control_character_but_line_feeds_and_tabs_is_left(text):
    left = {c for c in plain(text) if unicodedata.category(c) == "Cc"}
    assert left <= {"\n", "\t"}


@given(_HOSTILE)
def test_what_is_plain_stays_as_it_is(text):
    assert plain(plain(text)) == plain(text)


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf"])))
def test_text_without_controls_is_not_touched(text):
    assert plain(text) == text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b31mred", "red"),
        ("\x1bPq#0;2;0;0;0\x1b\\sixel", "sixel"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("\x1bcreset", "reset"),
        ("abc\u202edcba", "abcdcba"),
        ("[bold]markup[/bold]", "[bold]markup[/bold]"),
    ],
)
def test_escape_sequences_go_whole(text, left):
    assert plain(text) == left


@given(_HOSTILE, st.integers(2, 40))
def test_a_line_is_one_line_and_as_long_as_it_may_be(text, width):
    line = one_line(text, width)
    assert "\n" not in line
    assert len(line) <= width
