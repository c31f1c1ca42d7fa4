from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.tui.trace import REQUESTS, STEPS, EngineTrace, why_no_guesses
from localllm.tui.widgets.lanes import lanes


def step(*rows: tuple[int, str, int, int], seconds: float = 0.01, **more: int) -> dict:
    """rows: request, kind, rows, accepted."""
    names = ("request_id", "kind", "rows", "accepted_drafts")
    counts = dict.fromkeys(
        ("waiting", "running", "blocks_in_use", "blocks_idle", "blocks", "evictions"), 0
    )
    return {
        "batch": [dict(zip(names, row, strict=True)) for row in rows],
        "model_seconds": seconds,
        "total_seconds": seconds,
        **counts,
        **more,
    }


def test_speed_counts_what_was_produced():
    trace = EngineTrace()
    trace.add("StepDone", step((1, "prefill", 512, 0), seconds=5.0))
    trace.add("StepDone", step((1, "decode", 1, 0), (2, "verify", 4, 2)))
    assert trace.speed() == 4 / 0.01


def test_speed_is_unknown_before_anything_was_produced():
    trace = EngineTrace()
    assert trace.speed() is None
    trace.add("StepDone", step((1, "prefill", 512, 0)))
    assert trace.speed() is None


def test_a_request_is_followed_from_queue_to_end():
    trace = EngineTrace()
    trace.add("Queued", {"request_id": 3, "prompt_tokens": 40, "priority": 0})
    assert trace.lanes[3].state == "queued"
    trace.add("Started", {"request_id": 3, "cached_tokens": 32})
    trace.add("Preempted", {"request_id": 3})
    assert (trace.lanes[3].state, trace.lanes[3].preemptions) == ("preempted", 1)
    trace.add("Started", {"request_id": 3, "cached_tokens": 40})
    trace.add("Ended", {"request_id": 3, "reason": "stop", "receipt": {"seed": 1}})
    lane = trace.lanes[3]
    assert (lane.prompt, lane.cached, lane.state, lane.ended) == (40, 40, "stop", True)
    assert lane.receipt == {"seed": 1}


@given(st.lists(st.tuples(st.integers(0, 200), st.booleans()), max_size=300))
def test_nothing_grows_without_bound(told):
    trace = EngineTrace()
    for request, ends in told:
        trace.add("StepDone", step((request, "decode", 1, 0)))
        if ends:
            trace.add("Ended", {"request_id": request, "reason": "stop", "receipt": None})
    for _ in range(STEPS):
        trace.add("StepDone", step((0, "decode", 1, 0)))
    assert len(trace.steps) == STEPS
    assert len(trace.lanes) <= REQUESTS


def test_requests_under_way_outlive_those_that_ended():
    trace = EngineTrace()
    trace.add("Queued", {"request_id": 0, "prompt_tokens": 1, "priority": 0})
    for request in range(1, 2 * REQUESTS):
        trace.add("Ended", {"request_id": request, "reason": "stop", "receipt": None})
    assert 0 in trace.lanes


def test_events_of_another_version_are_passed_over():
    trace = EngineTrace()
    trace.add("Teleported", {"request_id": 1})
    assert not trace.lanes


class TestWhyNoGuesses:
    def test_the_chat_said_so(self):
        assert "parameters turn speculation off" in why_no_guesses(EngineTrace(), None, "off")

    def test_nothing_to_guess_from(self):
        trace = EngineTrace()
        trace.add("StepDone", step((1, "decode", 1, 0)))
        assert "Nothing to guess from" in why_no_guesses(trace, None)

    def test_it_is_on(self):
        trace = EngineTrace()
        trace.add("StepDone", step((1, "verify", 4, 3), seconds=0.02))
        assert why_no_guesses(trace, None) == (
            "On: 3 of 3 guessed tokens were right (100%); a token took 5.0 ms."
        )

    def test_it_turned_itself_off_for_a_reason_in_figures(self):
        trace = EngineTrace()
        for _ in range(5):
            trace.add("StepDone", step((1, "verify", 4, 0), seconds=0.03))
        for _ in range(20):
            trace.add("StepDone", step((1, "decode", 1, 0), seconds=0.01))
        why = why_no_guesses(trace, None)
        assert why.startswith("Off since step 5: 0 of 15 guessed tokens were right (0%)")
        assert "30.0 ms with guesses, 10.0 ms without" in why


def test_lanes_show_each_request_in_each_step():
    trace = EngineTrace()
    trace.add("StepDone", step((1, "prefill", 128, 0)))
    trace.add("StepDone", step((1, "verify", 4, 2), (2, "prefill", 64, 0), running=2))
    trace.add("StepDone", step((1, "decode", 1, 0), (2, "decode", 1, 0), running=2, waiting=1))
    lines = lanes(trace, 90).plain.split("\n")
    assert lines[0].startswith("#1 running")
    assert lines[0].endswith("▓2▪")
    assert lines[1].endswith(" ▓▪")
    assert "step 3: 2 rows in 10.0 ms, 2 running, 1 waiting" in lines[-1]


@pytest.fixture(scope="module")
def long_trace():
    trace = EngineTrace()
    for number in range(300):
        trace.add("StepDone", step((number % 3, "decode", 1, 0)))
    return trace


@given(st.integers(1, 200))
def test_lanes_fit_any_width(long_trace, width):
    for line in lanes(long_trace, width).plain.split("\n")[:-1]:
        assert len(line) <= max(width, 2)
