"""Every sampler against its definition, written down apart from it in naive.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from localllm.sampling import Sampler, SamplingParams, processors
from localllm.sampling.dry import Repetitions
from localllm.sampling.noise import coin, gumbel
from tests.sampling import naive

rows = arrays(np.float64, st.integers(2, 40), elements=st.floats(-15, 15), unique=True)
tokens = st.lists(st.integers(0, 4), min_size=1, max_size=40)


def by_id(logits: np.ndarray) -> dict[int, float]:
    return {i: float(x) for i, x in enumerate(logits) if x > -math.inf}


def kept(logits: np.ndarray, **settings) -> set[int]:
    shifted = logits - logits.max()
    return set(processors.candidates(shifted, 0, 1.0, 0.0, **settings).tolist())


@given(rows, st.floats(0.1, 4.0))
def test_top_n_sigma(logits, n):
    least = logits.max() - n * logits.std()
    assume(np.abs(logits - least).min() > 1e-9)
    assert kept(logits, top_n_sigma=n) == naive.top_n_sigma(by_id(logits), n)


@given(st.integers(0, 2**32), st.integers(2, 60), st.floats(0.05, 0.99))
def test_typical_p(seed, vocab, mass):
    """On smooth rows; where distances are equal both orders are right."""
    logits = np.random.default_rng(seed).normal(size=vocab) * 3
    expected = naive.typical(by_id(logits), mass)
    held = math.fsum(naive.softmax(by_id(logits))[t] for t in expected)
    assume(abs(held - mass) > 1e-9)
    assert kept(logits, typical_p=mass) == expected


@given(rows, st.floats(0.01, 0.9))
def test_xtc_drops_all_top_choices_but_the_last(logits, threshold):
    assume(min(abs(p - threshold) for p in naive.softmax(by_id(logits)).values()) > 1e-9)
    keep = processors.exclude_top(logits, threshold)
    assert set(np.flatnonzero(keep).tolist()) == naive.exclude_top(by_id(logits), threshold)


@given(rows, st.floats(0.1, 2.0), st.floats(0.01, 3.0), st.floats(0.2, 3.0))
def test_dynamic_temperature(logits, temperature, spread, exponent):
    expected = naive.dynamic_temperature(by_id(logits), temperature, spread, exponent)
    got = processors.dynamic_temperature(logits, temperature, spread, exponent)
    assert got == pytest.approx(expected, abs=1e-9)


def test_dynamic_temperature_spans_its_range():
    even, certain = np.zeros(50), np.full(50, -1e4)
    certain[3] = 0
    assert processors.dynamic_temperature(even, 1.0, 0.5, 1.0) == pytest.approx(1.5)
    assert processors.dynamic_temperature(certain, 1.0, 0.5, 1.0) == pytest.approx(0.5)
    one = sampler(50, temperature=1.0, dynatemp_range=5.0, seed=1)
    assert one.draw(certain.astype(np.float32), 0).token_id == 3


@given(
    tokens,
    tokens,
    st.floats(0.1, 2.0),
    st.floats(1.0, 2.0),
    st.integers(1, 4),
    st.sampled_from([-1, 1, 2, 3, 7, 20]),
    st.frozensets(st.integers(0, 4), max_size=2),
)
def test_dry(prompt, answer, multiplier, base, allowed_length, reach, breakers):
    """At every step of an answer, from a prompt of any length."""
    state = Repetitions(prompt, breakers, reach)
    for step in range(len(answer) + 1):
        expected = naive.dry_penalties(
            [*prompt, *answer[:step]],
            multiplier=multiplier,
            base=base,
            allowed_length=allowed_length,
            reach=reach,
            breakers=breakers,
        )
        ids, lengths = state.prolonging(allowed_length)
        penalties = multiplier * base ** (lengths - allowed_length).astype(float)
        assert dict(zip(ids.tolist(), penalties.tolist(), strict=True)) == pytest.approx(expected)
        if step < len(answer):
            state.append(answer[step])


def test_dry_keeps_a_sampler_from_going_in_circles():
    logits = np.array([3.0, 2.9, 0.0, 0.0], dtype=np.float32)
    prompt = [0, 1, 2, 0, 1]
    assert draw(logits, prompt=prompt, temperature=0) == 0
    wish = np.array([0.0, 0.0, 5.0, 4.0], dtype=np.float32)
    dry = {"dry_multiplier": 2.0, "dry_sequence_breakers": ()}
    assert draw(wish, prompt=prompt, temperature=0, **dry) == 3  # 2 would repeat "0 1 2"
    assert (
        draw(wish, prompt=prompt, temperature=0, dry_multiplier=2.0, dry_sequence_breakers=(1,))
        == 2
    )


def test_a_dry_penalty_stays_finite():
    """However long a repetition is."""
    one = sampler(
        4,
        prompt=[1] * 5000,
        temperature=0,
        dry_multiplier=1.0,
        dry_base=3.0,
        dry_sequence_breakers=(),
    )
    assert one.draw(np.array([0, 5, 1, 0], dtype=np.float32), 0).token_id == 2
    only = np.array([-np.inf, 5, -np.inf, -np.inf], dtype=np.float32)
    assert one.draw(only, 1).token_id == 1


@given(st.integers(0, 2**32), st.floats(1.0, 6.0), st.floats(0.05, 1.0))
def test_mirostat_follows_its_published_loop(seed, tau, eta):
    rng = np.random.default_rng(seed)
    one = sampler(60, seed=seed, mirostat=2, mirostat_tau=tau, mirostat_eta=eta, temperature=0.9)
    limit = 2 * tau
    for position in range(12):
        logits = (rng.normal(size=60) * 3).astype(np.float32)
        scaled = {t: x / 0.9 for t, x in by_id(logits).items()}
        surprises = [-math.log2(p) for p in naive.softmax(scaled).values()]
        if min(abs(s - limit) for s in surprises) < 1e-9:
            return
        allowed, probabilities = naive.mirostat_step(scaled, limit)
        noise = gumbel(seed, position, np.arange(60))
        expected = max(allowed, key=lambda t: scaled[t] + noise[t])
        assert one.draw(logits, position).token_id == expected
        limit -= eta * (-math.log2(probabilities[expected]) - tau)


def test_mirostat_brings_the_surprise_to_its_target():
    """That of the tokens it leaves, which is what its limit is moved by."""
    rng = np.random.default_rng(1)
    one = sampler(2000, seed=5, mirostat=True, mirostat_tau=3.0)
    surprises = []
    for position in range(600):
        logits = (rng.normal(size=2000) * 2).astype(np.float32)
        kept, probabilities = naive.mirostat_step(by_id(logits), one._surprise_limit)
        token = one.draw(logits, position).token_id
        assert token in kept
        surprises.append(-math.log2(probabilities[token]))
    assert abs(np.mean(surprises[100:]) - 3.0) < 0.1


def test_xtcs_coin_falls_as_often_as_asked_and_apart_from_the_noise():
    coins = np.array([coin(seed, 3) for seed in range(4000)])
    assert abs((coins < 0.3).mean() - 0.3) < 0.04
    noise = np.array([gumbel(seed, 3, np.array([0]))[0] for seed in range(4000)])
    assert abs(np.corrcoef(coins, noise)[0, 1]) < 0.07


def test_xtc_draws_by_the_share_of_its_probability():
    """Half the draws are from the whole distribution, half from what XTC leaves of it."""
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    params = {"xtc_probability": 0.5, "xtc_threshold": 0.2}
    drawn = [draw(logits, seed=seed, **params) for seed in range(4000)]
    share = np.bincount(drawn, minlength=4) / 4000
    expected = 0.5 * np.array([0.5, 0.3, 0.15, 0.05]) + 0.5 * np.array([0, 0.6, 0.3, 0.1])
    assert np.abs(share - expected).max() < 0.04


def test_the_filters_go_in_the_documented_order():
    """top_k first: of what it leaves, top_p takes its share."""
    logits = np.log(np.array([0.3, 0.25, 0.2, 0.15, 0.1])).astype(np.float32)
    both = {"top_k": 2, "top_p": 0.54}  # 0.3 of 0.55 is more than 0.54 of it
    assert {draw(logits, seed=s, **both) for s in range(200)} == {0}
    # top_p alone keeps three: 0.3 + 0.25 is just above 0.54, so two
    assert {draw(logits, seed=s, top_p=0.54) for s in range(200)} == {0, 1}


def sampler(vocab: int, prompt=(0,), **params) -> Sampler:
    return Sampler(SamplingParams(**params), prompt, vocab, frozenset())


def draw(logits: np.ndarray, position: int = 0, prompt=(0,), **params) -> int:
    return sampler(len(logits), prompt, **params).draw(logits, position).token_id
