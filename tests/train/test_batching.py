"""Which examples make up which step, promised for any data."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import InvalidRequest
from localllm.train.batching import Batches, shuffled

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200)


def places(step) -> list[int]:
    return [place for micro in step.micro_batches for place in micro]


@given(LENGTHS, st.integers(1, 7), st.integers(1, 4), st.booleans(), st.integers(0, 2**63))
def test_an_epoch_brings_every_example_once(lengths, size, accumulate, pack, seed):
    tokens = max(max(lengths), 64) if pack else None
    batches = Batches(lengths, size=size, accumulate=accumulate, tokens=tokens, seed=seed)
    first = batches.steps_in(1)
    for epoch, steps in ((0, range(first)), (1, range(first, batches.steps_in(2)))):
        met = [batches.at(step) for step in steps]
        assert Counter(p for step in met for p in places(step)) == Counter(range(len(lengths)))
        assert {step.epoch for step in met} == {epoch}
        assert met[-1].share == 1
        assert all(len(step.micro_batches) <= accumulate for step in met)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 3), st.booleans(), st.data())
def test_a_step_is_the_same_however_it_is_reached(lengths, size, accumulate, pack, data):
    tokens = max(max(lengths), 64) if pack else None
    settings = {"size": size, "accumulate": accumulate, "tokens": tokens, "seed": 5}
    one, other = Batches(lengths, **settings), Batches(lengths, **settings)
    walked = [one.at(step) for step in range(min(30, one.steps_in(3)))]
    step = data.draw(st.integers(0, len(walked) - 1))
    assert other.at(step) == walked[step]
    assert one.at(step) == walked[step]


@given(LENGTHS, st.integers(1, 4), st.integers(1, 4))
def test_how_a_step_is_cut_does_not_change_what_is_in_it(lengths, size, accumulate):
    cut = Batches(lengths, size=size, accumulate=accumulate, seed=1)
    whole = Batches(lengths, size=size * accumulate, seed=1)
    for step in range(cut.steps_in(1)):
        assert places(cut.at(step)) == places(whole.at(step))


@given(LENGTHS, st.integers(0, 100))
def test_packed_micro_batches_stay_within_their_tokens(lengths, more):
    tokens = max(lengths) + more
    batches = Batches(lengths, size=1, tokens=tokens)
    sizes = []
    for step in range(batches.steps_in(1)):
        for micro in batches.at(step).micro_batches:
            sizes.append(sum(lengths[place] for place in micro))
    assert max(sizes) <= tokens
    # First fit leaves at most one micro-batch of a window half empty.
    assert sum(2 * size <= tokens for size in sizes) <= 1 + len(lengths) // 32


@given(LENGTHS, st.integers(1, 6), st.booleans())
def test_no_micro_batch_is_larger_than_the_largest(lengths, size, pack):
    tokens = max(lengths) + 50 if pack else None
    batches = Batches(lengths, size=size, tokens=tokens)
    longest = [lengths[place] for place in batches.largest]
    assert tokens is None or sum(longest) <= tokens
    for step in range(batches.steps_in(1)):
        for micro in batches.at(step).micro_batches:
            held = sorted((lengths[place] for place in micro), reverse=True)
            assert held[0] <= longest[0]
            if not pack:
                assert all(a <= b for a, b in zip(held, longest, strict=False))


def test_lengths_of_a_micro_batch_are_alike():
    lengths = [1 + place * 37 % 500 for place in range(2000)]
    batches = Batches(lengths, size=4)
    spread = []
    for step in range(batches.steps_in(1)):
        held = [lengths[place] for place in places(batches.at(step))]
        spread.append(max(held) - min(held))
    assert sorted(spread)[len(spread) // 2] < 25
    order = [lengths[places(batches.at(step))[0]] for step in range(100)]
    assert order != sorted(order), "steps come by length"


def test_epochs_and_seeds_differ():
    lengths = list(range(1, 60))
    batches, other = Batches(lengths, size=4, seed=0), Batches(lengths, size=4, seed=1)
    epoch = batches.steps_in(1)
    assert [places(batches.at(s)) for s in range(epoch)] != [
        places(batches.at(s)) for s in range(epoch, 2 * epoch)
    ]
    assert [places(batches.at(s)) for s in range(epoch)] != [
        places(other.at(s)) for s in range(epoch)
    ]


def test_the_order_stays_the_same_from_version_to_version():
    assert shuffled(10, 0, 0).tolist() == ORDER


ORDER = [8, 0, 2, 9, 6, 5, 7, 4, 3, 1]


def test_parts_of_epochs():
    batches = Batches([5] * 40, size=4)
    assert batches.steps_in(1) == 10
    assert batches.steps_in(0.25) == 2
    assert batches.steps_in(2.5) == 25
    assert batches.steps_in(0.001) == 1


def test_one_example_is_a_data_set():
    batches = Batches([7], size=8, accumulate=4)
    assert [batches.at(step).micro_batches for step in range(3)] == [((0,),)] * 3


def test_what_cannot_be_batched_is_refused():
    with pytest.raises(InvalidRequest, match="no example"):
        Batches([], size=1)
    with pytest.raises(InvalidRequest, match="300 tokens, more than the 256"):
        Batches([10, 300], size=1, tokens=256)
