"""What does not fit is refused before loading, with the knob to turn."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.engine.planner import OVERHEAD, make_plan
from localllm.errors import InvalidRequest, OutOfMemoryPlan
from localllm.spec.memory import kv_bytes_per_token, step_bytes
from tests.engine.toy import toy_spec

SPEC = toy_spec(context=65536)
PER_TOKEN = kv_bytes_per_token(SPEC)


def plan(kv_positions_free: int, **wishes):
    available = 1000 + OVERHEAD + step_bytes(SPEC, 128, 32) + kv_positions_free * PER_TOKEN
    return make_plan(SPEC, weight_bytes=1000, kv_value_bytes=4, available=available, **wishes)


@given(
    st.integers(0, 200_000),
    st.none() | st.integers(1, 65536),
    st.none() | st.integers(1, 200_000),
)
def test_a_plan_fits_and_holds_one_context_or_is_refused(free, context, kv_tokens):
    try:
        made = plan(free, context=context, kv_tokens=kv_tokens)
    except (OutOfMemoryPlan, InvalidRequest):
        return
    assert made.total <= made.available
    assert made.kv_tokens >= made.context
    assert context is None or made.context == context
    assert kv_tokens is None or made.kv_tokens >= kv_tokens


def test_the_default_is_eight_thousand_positions_and_room_for_two_such_sequences():
    made = plan(10**6)
    assert (made.context, made.kv_tokens) == (8192, 16384)


def test_short_memory_shrinks_the_pool_before_it_refuses():
    assert plan(9000).kv_tokens == 8992
    with pytest.raises(OutOfMemoryPlan) as refused:
        plan(8000)
    assert "--context" in refused.value.hint
    assert "8000" in refused.value.hint
    assert plan(8000, context=8000).context == 8000


def test_a_larger_step_or_batch_takes_its_memory_from_the_pool():
    wide = replace(SPEC, vocab_size=50_000)
    sizes = [
        make_plan(wide, weight_bytes=0, kv_value_bytes=4, available=OVERHEAD + (8 << 20), **step)
        for step in ({"max_batch": 1}, {"max_batch": 32}, {"max_batch": 32, "step_rows": 4096})
    ]
    assert sizes[0].step_bytes < 1 << 20 < sizes[1].step_bytes < sizes[2].step_bytes
    assert sizes[1].step_bytes >= 32 * 50_000 * 4
    assert all(plan.total <= plan.available for plan in sizes)


def test_weights_that_do_not_fit_name_another_model_as_the_way_out():
    with pytest.raises(OutOfMemoryPlan) as refused:
        plan(0)
    assert "smaller model" in refused.value.hint


def test_a_context_the_model_does_not_have_is_refused():
    with pytest.raises(InvalidRequest, match="1 to 65536"):
        plan(10**6, context=65537)


def test_a_cache_smaller_than_one_context_is_refused():
    with pytest.raises(InvalidRequest, match="less than one context"):
        plan(10**6, context=100, kv_tokens=99)
