"""Schedules: where they begin, turn and end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import InvalidRequest
from localllm.train.schedules import SCHEDULES, make_schedule


@given(st.sampled_from(SCHEDULES), st.integers(1, 300), st.floats(0, 0.5), st.floats(0, 1))
def test_factors_rise_in_the_warm_up_then_never_and_stay_within_bounds(name, steps, share, low):
    schedule = make_schedule(name, steps, warmup=share, minimum=low)
    factors = [schedule(step) for step in range(steps + 1)]
    rising, rest = factors[: schedule.warmup], factors[schedule.warmup :]
    assert rising == sorted(rising)
    assert rest == sorted(rest, reverse=True)
    assert all(0 < factor <= 1 for factor in rising)
    assert all(low <= factor <= 1 for factor in rest)
    assert rest[0] == 1.0
    assert factors[-1] == (1.0 if name == "constant" else pytest.approx(low))


def test_no_step_is_wasted():
    for name in SCHEDULES:
        schedule = make_schedule(name, 10, warmup=4)
        assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
        assert schedule(9) > 0


def test_shapes():
    linear, cosine = make_schedule("linear", 100), make_schedule("cosine", 100)
    stays = make_schedule("wsd", 100, warmup=10, decay=0.2, minimum=0.1)
    assert linear(25) == 0.75
    assert cosine(25) == pytest.approx(0.8535533905932737)
    assert cosine(50) == pytest.approx(0.5)
    assert [stays(step) for step in (10, 79, 80, 90, 100)] == pytest.approx([1, 1, 1, 0.55, 0.1])


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("step", {}, "no schedule 'step'"),
        ("cosine", {"warmup": -1}, "warm-up must be"),
        ("cosine", {"warmup": 11}, "more than all 10"),
        ("wsd", {"warmup": 9, "decay": 0.5}, "9 steps of warm-up and 5 of decay"),
        ("linear", {"minimum": 2}, "end must be"),
    ],
)
def test_nonsense_is_refused(name, settings, words):
    with pytest.raises(InvalidRequest, match=words):
        make_schedule(name, 10, **settings)
