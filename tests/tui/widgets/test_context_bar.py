from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from localllm.tui.widgets.context_bar import ContextUse, cache_story, context_cells, context_line

USES = st.builds(
    ContextUse,
    used=st.integers(0, 9000),
    context=st.integers(1, 8192),
    cached=st.integers(0, 9000),
    reserve=st.integers(0, 4096),
)


@given(USES, st.integers(1, 200))
def test_the_bar_fills_its_width(use, width):
    assert context_cells(use, width).cell_length == width


def test_cached_used_kept_and_free_are_told_apart():
    bar = context_cells(ContextUse(used=50, context=100, cached=25, reserve=25), 20)
    assert bar.plain == "█" * 10 + "▒" * 5 + "░" * 5
    styles = [(span.start, span.end, str(span.style)) for span in bar.spans]
    assert styles[:2] == [(0, 5, "$success"), (5, 10, "$primary")]


@given(USES, st.integers(20, 200))
def test_what_does_not_fit_is_never_left_unsaid(use, width):
    line = context_line(use, width).plain
    if use.used > use.context:
        assert f"{use.used - use.context:,} tokens over" in line
    elif use.reserve > use.context - use.used:
        assert f"room for {use.context - use.used:,}" in line


def test_messages_that_go_are_counted():
    line = context_line(ContextUse(9000, 8192, left_out=3), 30).plain
    assert "the oldest 3 messages would be left out" in line


def test_the_receipt_tells_why_the_prefix_stopped():
    receipt = {"prompt_tokens": 100, "cached_tokens": 64, "cache_stop": "another adapter"}
    assert cache_story(receipt) == (
        "64 of 100 prompt tokens came from the cache (64%). The reuse ended there because: "
        "another adapter."
    )
    assert cache_story({}) == "No answer yet."
