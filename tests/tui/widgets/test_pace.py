"""Drawing takes a bounded share of the machine, and comes all the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.tui.widgets.pace import OFTEN, rest

SECONDS = st.floats(0, 5)


@given(worked=SECONDS, took=SECONDS)
def test_on_two_cores_drawing_takes_a_twenty_fifth_of_one_at_most(worked, took):
    cycle = took + rest(worked, took, cores=2)
    assert rest(worked, took, cores=2) >= 0
    assert worked <= 0.04 * cycle + 1e-9 or cycle >= 3


@given(worked=SECONDS, took=SECONDS, cores=st.integers(1, 256))
def test_it_never_waits_for_more_than_three_seconds(worked, took, cores):
    assert took + rest(worked, took, cores) <= max(3.0, took)


def test_a_cheap_drawing_on_many_cores_is_followed_by_the_next_at_once():
    assert rest(0.015, OFTEN, cores=16) == 0
    assert rest(0.015, OFTEN, cores=2) == pytest.approx(0.375 - OFTEN)
