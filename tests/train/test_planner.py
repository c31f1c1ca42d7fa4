"""The plan's sum, and that what it advises fits."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import OutOfMemoryPlan
from localllm.train.planner import Needs, Wish, plan_memory, require_fit, ways_out


def needs(examples, *, accumulated=False, pairs=1, per_token=1000) -> Needs:
    return Needs(
        resident=1_000_000,
        examples=tuple((length,) * pairs for length in sorted(examples, reverse=True)),
        working=lambda lengths: per_token * sum(lengths) + max(lengths) ** 2,
        vector=40_000,
        accumulated=accumulated,
        optimizer=80_000,
    )


def test_the_plan_is_the_sum_of_its_lines():
    plan = plan_memory(needs([100, 50], accumulated=True), 10**7)
    named = {item.name: item.nbytes for item in plan.items}
    assert named["largest micro-batch"] == 150_000 + 10_000
    assert named["gradients"] == 80_000
    assert named["optimizer"] == 80_000
    assert named["checkpoint under way"] == 120_000
    assert plan.total == sum(named.values())
    assert plan.fits
    assert len(plan.lines()) == len(named) + 1


@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=16),
    st.integers(1, 6),
    st.sampled_from([1, 2]),
    st.floats(0.05, 1.2),
)
def test_what_is_advised_fits_and_keeps_the_step_whole(lengths, accumulate, pairs, share):
    wanted = needs(lengths, accumulated=accumulate > 1, pairs=pairs)
    wish = Wish(len(lengths), accumulate, 4096)
    total = plan_memory(wanted, 0).total
    available = int(1_200_000 + share * (total - 1_200_000))
    plan = plan_memory(wanted, available)
    ways = ways_out(wanted, wish, available)
    for way in ways:
        assert way.total <= available
        flags = dict(re.findall(r"--(\S+) (\d+)", way.change))
        size, times = int(flags["batch-size"]), int(flags["accumulate"])
        assert size * times == len(lengths) * accumulate
        examples = [(int(flags["seq-len"]),) * pairs] if "seq-len" in flags else None
        changed = needs(
            [e[0] for e in examples] if examples else sorted(lengths, reverse=True)[:size],
            accumulated=times > 1,
            pairs=pairs,
        )
        assert plan_memory(changed, available).total == way.total
    if not plan.fits:
        with pytest.raises(OutOfMemoryPlan, match="training needs") as error:
            require_fit(plan, wanted, wish)
        assert (ways[0].change if ways else "smaller model") in (error.value.hint or "")
    else:
        require_fit(plan, wanted, wish)


def test_packed_micro_batches_are_made_smaller():
    wanted = needs([500, 400, 300, 200, 100])
    ways = ways_out(wanted, Wish(4, 1, 512, tokens=1600), plan_memory(wanted, 0).total - 600_000)
    assert ways[0].change == "--batch-tokens 800 --accumulate 2"


@pytest.mark.parametrize(("shortest", "told"), [(100, "drop"), (600, "cut")])
def test_dropping_long_examples_is_advised_only_where_some_are_left(shortest, told):
    wanted = needs([700])
    wish = Wish(1, 1, 1024, shortest=shortest)
    way = ways_out(wanted, wish, plan_memory(wanted, 0).total - 500_000)[0]
    assert f"--seq-len 320 --on-long {told}" in way.change


@pytest.mark.parametrize(("whole", "told"), [(False, "lower --rank"), (True, "train an adapter")])
def test_where_nothing_fits_it_says_what_takes_less(whole, told):
    wanted = needs([500])
    with pytest.raises(OutOfMemoryPlan) as error:
        require_fit(plan_memory(wanted, 10), wanted, Wish(1, 1, 512, whole=whole))
    assert "smaller model" in (error.value.hint or "")
    assert told in (error.value.hint or "")
