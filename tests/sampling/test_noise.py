"""The random stream is Philox4x32-10, and belongs to (seed, position, token)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.sampling import noise
from localllm.sampling.noise import coin, gumbel, philox4x32


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that the authors publish with Random123
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_its_published_answers(counter, key, expected):
    words = philox4x32(np.array([counter], dtype=np.uint32), key)
    assert words[0].tolist() == expected


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**20),
    st.sets(st.integers(0, 300_000), min_size=1, max_size=50),
)
def test_a_tokens_noise_does_not_depend_on_which_others_are_drawn(seed, position, tokens):
    ids = np.array(sorted(tokens))
    together = gumbel(seed, position, ids)
    alone = [gumbel(seed, position, ids[i : i + 1])[0] for i in range(len(ids))]
    assert together.tolist() == alone
    assert np.isfinite(together).all()


def test_noise_has_the_gumbel_distribution():
    values = np.sort(gumbel(7, 3, np.arange(40_000)))
    expected = np.exp(-np.exp(-values))
    empirical = (np.arange(len(values)) + 0.5) / len(values)
    # Kolmogorov-Smirnov at a level of 1e-6.
    assert np.abs(expected - empirical).max() < 2.7 / np.sqrt(len(values))


def test_neighbouring_seeds_and_positions_are_unrelated():
    ids = np.arange(5000)
    base = gumbel(1, 1, ids)
    for other in (gumbel(2, 1, ids), gumbel(1, 2, ids), gumbel(1 + 2**32, 1, ids)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.06


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 300_000), min_size=1, max_size=50),
)
def test_the_native_module_makes_the_same_noise(seed, position, tokens):
    ids = np.array(tokens)
    words = noise.noise_words(seed, position, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "native_module", lambda: None)
        assert noise.noise_words(seed, position, ids).tolist() == words.tolist()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_the_coin_is_philox_under_a_counter_of_its_own(seed, position):
    counter = np.array([[0, position, 1, 0]], dtype=np.uint32)
    word = int(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[0, 0])
    assert coin(seed, position) == (word + 0.5) / 2**32
