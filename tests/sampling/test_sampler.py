"""Draws follow the distribution asked for, and depend on nothing but logits, seed and position."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from localllm.errors import LocalLLMError
from localllm.sampling import Sampler, SamplingParams
from localllm.sampling.processors import candidates, softmax

logit_rows = arrays(
    np.float32, st.integers(2, 40), elements=st.floats(-20, 20, width=32), unique=True
)


def sampler(vocab: int, prompt=(0,), stop_ids=frozenset(), **params) -> Sampler:
    return Sampler(SamplingParams(**params), prompt, vocab, stop_ids)


@given(logit_rows)
def test_temperature_zero_takes_the_likeliest(logits):
    assert sampler(len(logits), temperature=0).draw(logits, 5).token_id == logits.argmax()


@given(logit_rows, st.integers(0, 2**64 - 1), st.integers(0, 10_000))
def test_the_same_seed_and_position_give_the_same_token(logits, seed, position):
    draws = {sampler(len(logits), seed=seed).draw(logits, position).token_id for _ in range(3)}
    assert len(draws) == 1


@given(logit_rows, st.integers(0, 2**32))
def test_top_k_of_one_is_greedy_at_any_temperature(logits, seed):
    drawn = sampler(len(logits), temperature=5.0, top_k=1, seed=seed).draw(logits, 0)
    assert drawn.token_id == logits.argmax()


@given(logit_rows, st.integers(0, 2**32))
def test_a_vanishing_temperature_is_greedy(logits, seed):
    drawn = sampler(len(logits), temperature=1e-300, seed=seed).draw(logits, 0)
    assert drawn.token_id == logits.argmax()


@given(
    logit_rows,
    st.integers(0, 50),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
def test_filters_keep_what_their_definitions_say(logits, top_k, top_p, min_p):
    """Against a plain loop over the tokens, likeliest first."""
    values = logits.astype(np.float64)
    order = np.argsort(-values, kind="stable").tolist()
    kept = order[:top_k] if top_k else order
    if top_p < 1:
        mass, nucleus = 0.0, []
        probabilities = softmax(values[kept])
        for token, probability in zip(kept, probabilities, strict=True):
            if nucleus and mass >= top_p:
                break
            nucleus.append(token)
            mass += probability
        kept = nucleus
    if min_p > 0:
        kept = [t for t in kept if values[t] >= values[kept[0]] + math.log(min_p)]
    assert set(candidates(values, top_k, top_p, min_p).tolist()) == set(kept)


@given(st.integers(0, 2**32), st.integers(1, 60), st.booleans(), st.booleans())
def test_top_k_of_a_large_vocabulary_is_the_same_set(seed, top_k, ties, banned):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=4099)
    if ties:
        values = values.round(1)
    if banned:
        values[rng.random(4099) < 0.999] = -np.inf
        values[7] = 0.0
    order = np.argsort(-values, kind="stable")
    finite = [i for i in order.tolist() if values[i] > -np.inf]
    assert candidates(values, top_k, 1.0, 0.0).tolist() == sorted(finite[:top_k])


def test_draws_follow_the_softmax():
    """Chi-square over 20,000 seeds at a level of 1e-6 (9 degrees of freedom: 49)."""
    logits = np.linspace(-1.5, 1.5, 10).astype(np.float32)
    counts = np.zeros(10)
    for seed in range(20_000):
        counts[sampler(10, seed=seed, temperature=0.8).draw(logits, 17).token_id] += 1
    expected = softmax(logits.astype(np.float64) / 0.8) * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 49


def test_successive_positions_of_one_seed_follow_the_softmax_too():
    logits = np.linspace(-1.0, 1.0, 6).astype(np.float32)
    one = sampler(6, seed=123)
    counts = np.bincount([one.draw(logits, p).token_id for p in range(20_000)], minlength=6)
    expected = softmax(logits.astype(np.float64)) * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 41  # 5 degrees of freedom, 1e-7


def test_an_unseeded_request_gets_a_seed_that_reproduces_it():
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    first = sampler(500)
    again = sampler(500, seed=first.seed)
    assert [first.draw(logits, p) for p in range(20)] == [again.draw(logits, p) for p in range(20)]


def test_bias_moves_and_bans():
    logits = np.zeros(5, dtype=np.float32)
    assert sampler(5, temperature=0, logit_bias={3: 1.0}).draw(logits, 0).token_id == 3
    banned = sampler(5, logit_bias=dict.fromkeys((0, 1, 2, 4), -math.inf))
    assert banned.draw(logits, 0).token_id == 3


def test_the_repetition_penalty_covers_prompt_and_answer_and_both_signs():
    logits = np.array([2.0, 1.5, -1.0, -1.1], dtype=np.float32)
    one = sampler(4, prompt=[0], temperature=0, repetition_penalty=2.0)
    assert one.draw(logits, 0).token_id == 1  # 0 stands at 1.0 now
    assert one.draw(logits, 1).token_id == 0  # 1 stands at 0.75
    negative = sampler(2, prompt=[0], temperature=0, repetition_penalty=2.0)
    assert negative.draw(np.array([-1.0, -1.5], dtype=np.float32), 0).token_id == 1


def test_presence_and_frequency_penalties_count_the_answer_only():
    logits = np.array([1.0, 0.5, 0.0], dtype=np.float32)
    one = sampler(3, prompt=[0, 0, 0], temperature=0, frequency_penalty=0.3)
    assert [one.draw(logits, p).token_id for p in range(4)] == [0, 0, 1, 0]
    two = sampler(3, temperature=0, presence_penalty=0.6)
    assert [two.draw(logits, p).token_id for p in range(3)] == [0, 1, 0]


def test_no_stop_id_before_min_tokens():
    logits = np.array([5.0, 1.0], dtype=np.float32)
    one = sampler(2, temperature=0, min_tokens=2, stop_ids=frozenset({0}))
    assert [one.draw(logits, p).token_id for p in range(3)] == [1, 1, 0]


@given(logit_rows)
def test_logprobs_are_the_models_own(logits):
    """Whatever temperature, bias and filters do, the softmax of the raw logits is reported."""
    draw = sampler(len(logits), temperature=0.3, top_k=1, logit_bias={0: 3.0}, logprobs=3).draw(
        logits, 0
    )
    exact = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    assert draw.logprob == pytest.approx(exact[draw.token_id], abs=1e-12)
    best = sorted(range(len(logits)), key=lambda i: -exact[i])[:3]
    assert [i for i, _ in draw.top] == best
    assert [p for _, p in draw.top] == pytest.approx([exact[i] for i in best], abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_an_error_not_a_token(bad):
    logits = np.array([0.0, bad, 1.0], dtype=np.float32)
    with pytest.raises(LocalLLMError, match="position 9"):
        sampler(3).draw(logits, 9)


def test_drawing_leaves_the_logits_alone():
    logits = np.arange(8, dtype=np.float32)
    before = logits.copy()
    sampler(8, repetition_penalty=1.5, logit_bias={2: 4.0}, min_p=0.1).draw(logits, 0)
    assert np.array_equal(logits, before)
