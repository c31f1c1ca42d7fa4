"""Attention over the cache is near a float64 oracle for every cache width, and one arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.kernels_cpu import _native
from tests.examples import examples

KERNELS = _native.usable_kernels()
# Largest error over the largest entry of v: rounding of the cache, then of 8- and 4-bit entries.
TOLERANCE = {32: 1e-5, 16: 2e-3, 8: 2e-2, 4: 0.4}


def oracle(q, k, v, window):
    """float64 causal attention in units of log2: q [T, H, D], k and v [T, K, D] -> [T, H, D]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = np.einsum("thd,shd->hts", q, np.repeat(k, group, axis=1))
    t, s = np.indices(scores.shape[1:])
    hidden = (s > t) | ((window > 0) & (s <= t - window))
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp2(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, np.repeat(v, group, axis=1))


def attend(q, k, v, *, bits, block=32, window=0, together=1, kernels=KERNELS[-1]):
    out = np.empty_like(q)
    _native.attention(q, k, v, out, bits, block, window, together, kernels)
    return out


def entries(seed, tokens, heads, kv_heads, dim):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((tokens, heads, dim), np.float32) / np.float32(np.sqrt(dim))
    k, v = rng.standard_normal((2, tokens, kv_heads, dim), np.float32)
    return q, k, v


@given(
    st.sampled_from([32, 16, 8, 4]),
    st.sampled_from([1, 3, 16, 31, 32, 33, 64, 96]),
    st.sampled_from([8, 24, 32, 64, 80, 128]),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (7, 1), (9, 3), (10, 10)]),
    st.integers(1, 150),
    st.sampled_from([0, 0, 1, 5, 40]),
    st.sampled_from([1, 2, 5, 16]),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=examples(60))
def test_it_is_near_the_oracle_and_every_way_gives_the_same_bits(
    bits, block, dim, heads, tokens, window, together, seed
):
    q, k, v = entries(seed, tokens, *heads, dim)
    got = attend(q, k, v, bits=bits, block=block, window=window, together=together)
    error = np.abs(got - oracle(q, k, v, window)).max()
    assert error <= TOLERANCE[bits] * np.abs(v).max()
    for kernels in KERNELS:
        other = attend(q, k, v, bits=bits, window=window, kernels=kernels)
        assert np.array_equal(other, got)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_parts_of_a_long_context_are_merged(bits):
    q, k, v = entries(1, 1100, 6, 2, 32)
    got = attend(q, k, v, bits=bits, together=16)
    assert np.abs(got - oracle(q, k, v, 0)).max() < TOLERANCE[bits] * np.abs(v).max()
    assert np.array_equal(attend(q, k, v, bits=bits, together=3, block=48), got)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.15)])
def test_rounding_costs_little_of_the_output_even_with_outlying_channels(bits, most):
    q, k, v = entries(2, 256, 6, 2, 64)
    k[:, :, 5] += 20.0  # as keys of real models have them
    q[:, :, 5] *= 0.1
    wanted = oracle(q, k, v, 0)
    off = attend(q, k, v, bits=bits, together=16) - wanted
    assert np.sqrt((off**2).mean()) < most * np.sqrt((wanted**2).mean()) + most * 0.1


@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_that_is_not_finite_spoils_only_those_that_see_it(bits):
    q, k, v = entries(3, 40, 2, 1, 32)
    wanted = attend(q, k, v, bits=bits)
    v[20, 0, 7] = np.nan
    got = attend(q, k, v, bits=bits, together=4)
    assert np.array_equal(got[:20], wanted[:20])
    assert np.isnan(got[20:]).any(axis=(1, 2)).all()
    # Past a window of 5 nothing of it is left.
    assert np.isfinite(attend(q, k, v, bits=bits, window=5)[25:]).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [15000.0, 1.0, 1e-2])
def test_large_and_small_entries_survive(bits, size):
    q, k, v = entries(4, 1, 1, 1, 32)
    v *= np.float32(size)
    off = attend(q, k, v, bits=bits) - v
    assert np.linalg.norm(off) < (0.02 if bits == 8 else 0.2) * np.linalg.norm(v)


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_stays_zero(bits):
    q, k, v = entries(5, 1, 1, 1, 32)
    assert (attend(q, k, 0 * v, bits=bits) == 0).all()
