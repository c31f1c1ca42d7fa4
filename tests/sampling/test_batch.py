"""A batch draws what its rows would draw alone, with and without the native module."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.errors import LocalLLMError
from localllm.sampling import Draw, Sampler, SamplingParams, batch, draw_batch, noise
from localllm.sampling.processors import softmax
from tests.examples import examples

pytest.importorskip("localllm.kernels_cpu._native")

BREAKERS = {"dry_sequence_breakers": ()}
WISHES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-300, 0.01, 0.3, 0.7, 1.0, 2.0, 50.0, 1e200]),
        "top_k": st.sampled_from([0, 1, 2, 5, 40, 300]),
        "top_p": st.sampled_from([0.05, 0.25, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.2, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.3]),
        "frequency_penalty": st.sampled_from([-0.5, 0.7]),
        "logit_bias": st.dictionaries(
            st.integers(0, 4), st.sampled_from([-math.inf, -1.0, 0.0, 8.0]), max_size=3
        ),
        "min_tokens": st.sampled_from([0, 3]),
    },
)
RARER = st.sampled_from(
    [
        {},
        {"dry_multiplier": 0.8, **BREAKERS},
        {"typical_p": 0.8},
        {"top_n_sigma": 1.0},
        {"xtc_probability": 0.5},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05, "typical_p": 0.7},
        {"logprobs": 3},
    ]
)


@st.composite
def row_of_logits(draw, vocab: int) -> np.ndarray:
    """Smooth, full of ties, mostly banned, or broken."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.normal(size=vocab) * draw(st.sampled_from([0.0, 1e-6, 1.0, 4.0, 30.0]))
    kind = draw(st.sampled_from(["smooth", "ties", "banned", "one left", "nan", "inf", "offset"]))
    if kind == "ties":
        logits = logits.round()
    elif kind == "banned":
        logits[rng.random(vocab) < 0.9] = -np.inf
    elif kind == "one left":
        logits[np.arange(vocab) != rng.integers(vocab)] = -np.inf
    elif kind in ("nan", "inf"):
        logits[rng.integers(vocab)] = getattr(np, kind)
    elif kind == "offset":
        logits += draw(st.sampled_from([-1e4, 1e4, 1e30]))
    return logits.astype(np.float32)


def outcome(draw: Draw | Exception) -> str:
    """Comparable: a NaN is equal to itself."""
    return repr(draw)


def drawn(monkeypatch, native: bool, make, steps: list[np.ndarray]) -> list[list[str]]:
    """What the samplers draw step by step, with the native module or without."""
    with monkeypatch.context() as patch:
        if not native:
            patch.setattr(batch, "native_module", lambda: None)
            patch.setattr(noise, "native_module", lambda: None)
        samplers = make()
        return [
            [outcome(d) for d in draw_batch(samplers, logits, [step] * len(samplers))]
            for step, logits in enumerate(steps)
        ]


@settings(max_examples=examples(60))
@given(st.data(), st.sampled_from([1, 2, 5, 63, 64, 65, 200, 1500]))
def test_the_native_module_draws_what_numpy_draws(data, vocab):
    """And a batch what its rows draw alone, errors included."""
    count = data.draw(st.integers(1, 4))
    wishes = [
        {"seed": data.draw(st.integers(0, 2**64 - 1)), **data.draw(WISHES), **data.draw(RARER)}
        for _ in range(count)
    ]
    for wish in wishes:
        wish["logit_bias"] = {k: v for k, v in wish.get("logit_bias", {}).items() if k < vocab}

    def make() -> list[Sampler]:
        return [
            Sampler(SamplingParams(**wish), [0, vocab - 1], vocab, frozenset({vocab // 2}))
            for wish in wishes
        ]

    steps = [np.stack([data.draw(row_of_logits(vocab)) for _ in range(count)]) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        native = drawn(patch, True, make, steps)
        assert native == drawn(patch, False, make, steps)
        alone = [[] for _ in steps]
        for row in range(count):
            one = drawn(patch, True, lambda: [make()[row]], [s[row : row + 1] for s in steps])  # noqa: B023
            for step, draws in enumerate(one):
                alone[step] += draws
        assert native == alone


@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_of_a_large_vocabulary_the_native_module_decides_every_row(monkeypatch, scale):
    """And as NumPy does."""
    rng = np.random.default_rng(int(scale * 10))
    wishes = [
        {},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 0.0},
        {"repetition_penalty": 1.2, "temperature": 0.8},
        {"top_p": 0.9, "frequency_penalty": 0.5},
        {"top_k": 2000, "top_p": 0.5},
        {"top_k": 100, "typical_p": 0.5, "min_p": 0.02},
        {"top_k": 50, "xtc_probability": 0.7, "top_p": 0.95},
    ]
    prompt = rng.integers(0, 49_152, 500).tolist()

    def make() -> list[Sampler]:
        return [
            Sampler(SamplingParams(seed=i, **wish), prompt, 49_152, frozenset())
            for i, wish in enumerate(wishes)
        ]

    steps = [(rng.normal(size=(len(wishes), 49_152)) * scale).astype(np.float32) for _ in range(2)]
    expected = drawn(monkeypatch, False, make, steps)
    monkeypatch.delattr(Sampler, "choose")
    assert drawn(monkeypatch, True, make, steps) == expected


def test_every_instruction_set_draws_the_same(monkeypatch):
    from localllm.kernels_cpu import _native

    rng = np.random.default_rng(4)
    logits = (rng.normal(size=(4, 10_007)) * 4).astype(np.float32)
    wishes = [{}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.9}, {"temperature": 0.0}]
    results = []
    for kernels in _native.usable_kernels():
        monkeypatch.setattr(batch, "kernels", lambda k=kernels: k)
        samplers = [Sampler(SamplingParams(seed=9, **w), (0,), 10_007, frozenset()) for w in wishes]
        results.append(draw_batch(samplers, logits, [3] * 4))
    assert all(result == results[0] for result in results)


def test_a_row_that_fails_leaves_the_others_alone():
    logits = np.zeros((3, 8), dtype=np.float32)
    logits[1, 4] = math.nan
    logits[2, 6] = 9.0
    samplers = [Sampler(SamplingParams(temperature=0), (0,), 8, frozenset()) for _ in range(3)]
    first, second, third = draw_batch(samplers, logits, [5, 6, 7])
    assert (first, third) == (Draw(0), Draw(6))
    assert isinstance(second, LocalLLMError)
    assert "position 6" in str(second)


def test_the_same_sampler_twice_draws_in_turn():
    logits = np.array([[1.0, 0.5, 0.0]] * 3, dtype=np.float32)
    one = Sampler(SamplingParams(temperature=0, presence_penalty=0.7), (0,), 3, frozenset())
    draws = draw_batch([one] * 3, logits, [0, 1, 2])
    assert [draw.token_id for draw in draws] == [0, 1, 0]


@given(
    st.integers(0, 2**32),
    st.sampled_from(
        [
            {"repetition_penalty": 1.4},
            {"presence_penalty": 0.5, "frequency_penalty": 0.4},
            {"dry_multiplier": 1.0, **BREAKERS},
            {"mirostat": 2, "mirostat_tau": 2.0},
            {"min_tokens": 6},
        ]
    ),
)
def test_a_fork_goes_on_as_the_original_would_and_disturbs_it_not(seed, wish):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(12, 20)).astype(np.float32)

    def draws(one: Sampler, steps: range) -> list[int]:
        return [one.draw(logits[p], p).token_id for p in steps]

    params = SamplingParams(seed=seed, **wish)
    whole = draws(Sampler(params, [1, 2, 3, 1], 20, frozenset({5})), range(12))
    one = Sampler(params, [1, 2, 3, 1], 20, frozenset({5}))
    assert draws(one, range(5)) == whole[:5]
    fork, thrown_away = one.fork(), one.fork(seed=seed + 1)
    for position in range(5, 12):
        thrown_away.draw(-logits[position], position)
    assert draws(fork, range(5, 12)) == whole[5:]
    assert draws(one, range(5, 12)) == whole[5:]


def test_a_fork_with_another_seed_draws_otherwise():
    logits = np.zeros(1000, dtype=np.float32)
    one = Sampler(SamplingParams(seed=1), (0,), 1000, frozenset())
    assert one.fork(seed=2).draw(logits, 0) != one.fork().draw(logits, 0)
    assert one.fork(seed=2).seed == 2


def test_an_accepted_token_counts_as_a_drawn_one():
    logits = np.array([1.0, 0.9, 0.0], dtype=np.float32)
    one = Sampler(SamplingParams(temperature=0, presence_penalty=0.5), (0,), 3, frozenset())
    one.accept(0)
    assert one.draw(logits, 1).token_id == 1


@pytest.mark.parametrize(
    "wish", [{}, {"top_k": 6}, {"min_p": 0.2}, {"top_p": 0.9}, {"temperature": 0.7}]
)
def test_draws_of_a_batch_follow_the_distribution(wish):
    """Chi-square over 20,000 seeds at a level below 1e-6 (at most 9 degrees of freedom: 49)."""
    logits = np.linspace(-1.5, 1.5, 10).astype(np.float32)
    counts = np.zeros(10)
    for first in range(0, 20_000, 1000):
        samplers = [
            Sampler(SamplingParams(seed=s, **wish), (0,), 10, frozenset())
            for s in range(first, first + 1000)
        ]
        draws = draw_batch(samplers, np.tile(logits, (1000, 1)), [17] * 1000)
        counts += np.bincount([draw.token_id for draw in draws], minlength=10)
    kept = counts > 0
    expected = softmax(logits[kept].astype(float) / wish.get("temperature", 1.0)) * 20_000
    assert ((counts[kept] - expected) ** 2 / expected).sum() < 49
    if wish.get("top_k"):
        assert kept.sum() == 6
