from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from localllm.tui.widgets.sparkline import BARS, Series, braille, plotted, spark, thinned

NUMBERS = st.floats(-1e6, 1e6)


@given(st.lists(NUMBERS | st.just(math.nan)), st.integers(0, 40))
def test_bars_are_of_the_last_values_and_fit(values, width):
    bars = spark(values, width)
    good = [value for value in values if not math.isnan(value)]
    assert len(bars) == min(width, len(good))
    shown = good[-width:] if width else []
    if shown and max(shown) > min(shown):
        assert bars[shown.index(max(shown))] == BARS[-1]
        assert bars[shown.index(min(shown))] == BARS[0]


def test_a_scale_of_its_own_holds_the_bars_back():
    assert spark([0.5, 1.0], 2, low=0.0, high=1.0) == BARS[4] + BARS[7]
    assert spark([5.0, -5.0], 2, low=0.0, high=1.0) == BARS[7] + BARS[0]


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=50))
def test_a_curve_stays_inside_and_touches_its_ends(points):
    x_range = min(x for x, _ in points), max(x for x, _ in points)
    y_range = min(y for _, y in points), max(y for _, y in points)
    rows = braille(points, 10, 4, x_range, y_range)
    assert [len(row) for row in rows] == [10] * 4
    assert all(0x2800 <= ord(cell) <= 0x28FF for row in rows for cell in row)
    if y_range[1] > y_range[0]:
        assert set(rows[0]) != {"\u2800"}
        assert set(rows[-1]) != {"\u2800"}


def test_a_fall_is_drawn_without_gaps():
    rows = braille([(0, 1), (1, 0)], 8, 4, (0, 1), (0, 1))
    filled = {place for row in rows for place, cell in enumerate(row) if cell != "\u2800"}
    assert filled == set(range(8))


def test_points_are_thinned_to_means():
    points = [(float(x), float(x % 2)) for x in range(100)]
    few = thinned(points, 10)
    assert len(few) == 10
    assert {y for _, y in few} == {0.5}
    assert thinned(points, 1000) == points


def test_a_plot_has_its_ends_and_names():
    text = plotted(
        [Series("loss", ((0, 3.5), (100, 0.25))), Series("valid", ((0, math.nan), (50, 2)))],
        50,
        6,
        "step",
    ).plain
    lines = text.split("\n")
    assert len(lines) == 6
    assert lines[0].startswith(" 3.5│")
    assert lines[4].startswith("0.25│")
    assert "● loss" in lines[5]
    assert "● valid" in lines[5]
    assert lines[5].endswith("step 100")
    assert {len(line) for line in lines} == {50}


def test_no_points_say_so():
    assert plotted([], 50, 6).plain == "no points yet"
    assert plotted([Series("loss", ((0, math.nan),))], 50, 6).plain == "no points yet"
