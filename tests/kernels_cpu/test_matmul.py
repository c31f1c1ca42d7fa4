"""A matmul is what float64 makes of the same rounded input; and the same bits every way."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.backend.cpu_weights import add_matrix
from localllm.checkpoint.tensor import Tensor
from localllm.kernels_cpu import _native
from tests.backend.random_models import PACKINGS, Packing, random_dense, unpacked

KERNELS = _native.usable_kernels()

shapes = st.tuples(st.integers(1, 70), st.sampled_from([128, 256, 768]))


def rounded(x: np.ndarray, kernels: str) -> np.ndarray:
    out = np.empty_like(x)
    _native.round_activations(x, out, kernels)
    return out


def matmul(tensor: Tensor, x: np.ndarray, kernels: str, *, accurate: bool = False) -> np.ndarray:
    store = _native.WeightStore()
    add_matrix(store, "w", tensor)
    out = np.full((len(x), tensor.shape[0]), np.nan, np.float32)
    _native.matmul(store, "w", x, out, kernels, accurate)
    return out


def inputs(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    return (rng.normal(size=(rows, width)) * rng.uniform(0.01, 10, (rows, 1))).astype(np.float32)


def assert_near(got: np.ndarray, x: np.ndarray, tensor: Tensor) -> None:
    """Within 1e-6 of the sum of the magnitudes that were added."""
    x, w = x.astype(np.float64), unpacked(tensor)
    error = np.abs(got - x @ w.T)
    assert (error <= 1e-6 * (np.abs(x) @ np.abs(w).T) + 1e-30).all()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.of)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(shape=shapes, rows=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_every_packing_is_exact_given_its_rounded_input(
    packing: Packing, kernels, shape, rows, seed
):
    rng = np.random.default_rng(seed)
    tensor, x = packing.random(rng, shape), inputs(rng, rows, shape[1])
    got = matmul(tensor, x, kernels)
    seen = rounded(x, kernels).astype(np.float64)
    w, codes = unpacked(tensor), unpacked(replace(tensor, biases=None))
    # Codes and biases are summed apart, so the error is measured against both sums.
    magnitude = np.abs(seen) @ (np.abs(codes) + np.abs(w - codes)).T
    assert (np.abs(got - seen @ w.T) <= 1e-6 * magnitude + 1e-30).all()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("packing", PACKINGS[:9], ids=lambda packing: packing.of)
def test_float_activations_reach_the_matmul_unrounded(packing: Packing, kernels):
    rng = np.random.default_rng(3)
    tensor, x = packing.random(rng, (50, 512)), inputs(rng, 7, 512)
    assert_near(matmul(tensor, x, kernels, accurate=True), x, tensor)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 130)),
    rows=st.integers(1, 13),
    seed=st.integers(0, 2**32 - 1),
)
def test_dense_weights_take_any_shape(dtype, kernels, shape, rows, seed):
    rng = np.random.default_rng(seed)
    tensor, x = random_dense(rng, shape, dtype), inputs(rng, rows, shape[1])
    assert_near(matmul(tensor, x, kernels), x, tensor)


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.of)
def test_a_row_has_the_same_bits_in_any_batch_and_instruction_set(packing: Packing):
    rng = np.random.default_rng(5)
    tensor, x = packing.random(rng, (43, 384)), inputs(rng, 21, 384)
    wanted = matmul(tensor, x, "scalar")
    for kernels in KERNELS:
        for rows in (1, 2, 3, 4, 5, 8, 9, 16, 21):
            assert np.array_equal(matmul(tensor, x[:rows], kernels), wanted[:rows])
            assert np.array_equal(matmul(tensor, x[-rows:], kernels), wanted[-rows:])


def test_the_largest_codes_do_not_overflow():
    """All codes at their maximum against inputs of one sign: the worst of all sums."""
    for packing in PACKINGS:
        rng = np.random.default_rng(0)
        tensor = packing.random(rng, (16, 128))
        tensor.codes[:] = 0xFFFFFFFF
        for sign in (1, -1):
            x = np.full((5, 128), sign * 2.0, np.float32)
            wanted = matmul(tensor, x, "scalar")
            assert_near_relative(wanted, x.astype(np.float64) @ unpacked(tensor).T)
            for kernels in KERNELS:
                assert np.array_equal(matmul(tensor, x, kernels), wanted)


def assert_near_relative(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max() + 1e-5


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_row_that_is_not_finite_spoils_itself_alone(kernels):
    rng = np.random.default_rng(9)
    tensor, x = PACKINGS[1].random(rng, (32, 128)), inputs(rng, 9, 128)
    clean = matmul(tensor, x, kernels)
    x[2, 5], x[4, 100], x[7, 31] = np.nan, np.inf, -np.inf
    got = matmul(tensor, x, kernels)
    spoilt = [2, 4, 7]
    assert np.isnan(got[spoilt]).all()
    whole = [row for row in range(9) if row not in spoilt]
    assert np.array_equal(got[whole], clean[whole])


@pytest.mark.parametrize("kernels", KERNELS)
def test_rounding_is_to_nearest_even_with_127_steps_a_side(kernels):
    x = np.zeros((1, 64), np.float32)
    x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -126.5]
    assert rounded(x, kernels)[0, :6].tolist() == [127, 0, 2, 2, 0, -126]
    assert (rounded(x, kernels)[0, 32:] == 0).all()


def test_asking_for_weights_ahead_changes_no_bit():
    """However far: beyond the end of a matrix, too, where nothing may be read."""
    code = """
import numpy as np, sys
from localllm.backend.cpu_weights import add_matrix
from localllm.checkpoint.tensor import Affine, GroupValues
from localllm.kernels_cpu import _native
random = np.random.default_rng(1)
codes = random.integers(0, 1 << 32, (100, 72), np.uint32)
matrix = Affine(codes, 4, 32, GroupValues(random.random((100, 18)).astype(np.float16)), None, 8)
store = _native.WeightStore()
add_matrix(store, "w", matrix)
for rows in (1, 3, 11):
    x = random.standard_normal((rows, 576)).astype(np.float32)
    out = np.empty((rows, 100), np.float32)
    for kernels in _native.usable_kernels():
        _native.matmul(store, "w", x, out, kernels)
        sys.stdout.buffer.write(out.tobytes())
"""
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "LOCALLLM_STREAM_AHEAD": distance},
            capture_output=True,
            check=True,
        ).stdout
        for distance in ("0", "4096", "1073741824")
    }
    assert len(told) == 1
    assert len(told.pop()) == 15 * 100 * 4 * len(KERNELS)
