"""Masks and embedding noise: the hash of `Noise`, written here from its words in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.train.noise import dropout_mask, embedding_noise
from localllm.train.program import Noise


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def hashed(seed: int, target: int, row: int, column: int) -> int:
    """In Python's whole numbers, so that nothing wraps unseen."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    of_row = mix((mix(low ^ mix(high ^ target)) + row) & 0xFFFFFFFF)
    return mix((of_row + column * 0x9E3779B9) & 0xFFFFFFFF)


@given(
    st.integers(0, 2**64 - 1),
    st.floats(0, 0.99),
    st.integers(0, 300),
    st.integers(0, 2**32 - 4),
    st.integers(1, 9),
)
def test_masks_are_the_hash_to_the_bit(seed, dropout, target, first, columns):
    rows = np.arange(first, first + 3).astype(np.uint32)
    mask = np.array(dropout_mask(Noise(seed, dropout), target, rows, columns))
    expected = [
        [hashed(seed, target, int(row), column) >= dropout * 2**32 for column in range(columns)]
        for row in rows
    ]
    assert mask.tolist() == expected


def test_masks_drop_their_share_and_differ():
    rows = np.arange(2000).astype(np.uint32)
    masks = [
        np.array(dropout_mask(Noise(seed, 0.3), target, rows, 100))
        for seed, target in [(0, 0), (0, 1), (1, 0), (6 << 32, 0)]
    ]
    for number, mask in enumerate(masks):
        assert mask.mean() == pytest.approx(0.7, abs=0.005)
        assert mask.mean(axis=0) == pytest.approx(0.7, abs=0.06)
        for other in masks[:number]:
            assert (mask == other).mean() == pytest.approx(0.58, abs=0.01)  # 0.7^2 + 0.3^2


def test_embedding_noise_is_uniform_and_shrinks_with_the_sequence():
    lengths = np.array([4, 4, 900])
    noise = Noise(seed=9, neftune=5.0)
    found = np.array(embedding_noise(noise, np.arange(3, dtype=np.uint32), lengths, 64))
    for row, length in enumerate(lengths):
        unit = [hashed(9, 0xFFFFFFFF, row, column) / 2**31 - 1 for column in range(64)]
        expected = np.array(unit) * 5.0 / np.sqrt(length * 64)
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-7)
