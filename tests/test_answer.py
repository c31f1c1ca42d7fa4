"""Text ends at the first stop string, however tokens cut it, and nothing of it leaks."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from localllm.answer import StopFinder

letters = st.text("ab\n", max_size=30)


@st.composite
def cut_text(draw):
    text = draw(letters)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    borders = [0, *cuts, len(text)]
    return text, [text[a:b] for a, b in pairwise(borders)]


@given(cut_text(), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_the_text_before_the_first_stop_string_passes_and_no_more(cut, stops):
    text, pieces = cut
    finder = StopFinder(tuple(stops))
    passed = ""
    for piece in pieces:
        passed += finder.push(piece)
        assert not any(stop in passed for stop in stops)
        if finder.found is not None:
            break
    if finder.found is None:
        passed += finder.finish()
        assert passed == text
        assert not any(stop in text for stop in stops)
    else:
        assert finder.found in stops
        assert text.startswith(passed + finder.found)
        # Nothing earlier would have ended it.
        assert not any(stop in passed for stop in stops)


@given(cut_text())
def test_without_stop_strings_nothing_is_held_back(cut):
    _, pieces = cut
    finder = StopFinder(())
    assert [finder.push(piece) for piece in pieces] == pieces
    assert finder.finish() == ""


def test_only_what_may_begin_a_stop_string_is_held_back():
    finder = StopFinder(("STOP",))
    assert finder.push("one ST") == "one "
    assert finder.push("E") == "STE"
    assert finder.push("ST") == ""
    assert finder.push("OP and more") == ""
    assert finder.found == "STOP"
