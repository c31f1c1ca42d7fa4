"""Dense and affine weights in memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from localllm.checkpoint import Affine, Dense, GroupValues
from localllm.checkpoint.form import form_of
from localllm.checkpoint.tensor import pack_codes

RNG = np.random.default_rng(1)


def random_affine(*shape: int, bits: int = 4, group: int = 32, two_levels: bool = False) -> Affine:
    groups = (*shape[:-1], shape[-1] // group)

    def values() -> GroupValues:
        if not two_levels:
            return GroupValues(RNG.standard_normal(groups).astype(np.float16))
        blocks = (*shape[:-1], groups[-1] // 4)
        return GroupValues(
            RNG.standard_normal(blocks).astype(np.float16),
            RNG.integers(-128, 128, groups).astype(np.int8),
        )

    codes = RNG.integers(0, 1 << bits, shape, dtype=np.uint8)
    return Affine(pack_codes(codes, bits), bits, group, values(), values(), zero_point=3)


def by_definition(w: Affine) -> np.ndarray:
    codes = w.unpack().astype(np.float32) - np.float32(w.zero_point)
    scale = np.repeat(w.scales.to_float32(), w.group, axis=-1)
    assert w.biases is not None
    return codes * scale + np.repeat(w.biases.to_float32(), w.group, axis=-1)


@pytest.mark.parametrize("shape", [(6, 256), (2, 3, 128), (700, 512)])
@pytest.mark.parametrize("two_levels", [False, True])
def test_affine_weights_follow_the_formula(shape: tuple[int, ...], two_levels: bool) -> None:
    w = random_affine(*shape, two_levels=two_levels)
    assert w.shape == shape
    assert np.array_equal(w.to_float32(), by_definition(w))


def test_two_levels_multiply_exactly() -> None:
    values = np.array([[0.1, -7.5]], np.float16)
    multiplier = np.array([[-32, 31, 127, -128]], np.int8)
    got = GroupValues(values, multiplier).to_float32()
    exact = np.repeat(values.astype(np.float64), 2, axis=-1) * multiplier
    assert np.array_equal(got.astype(np.float64), exact)


@pytest.mark.parametrize("index", [slice(1, 4), np.array([5, 0, 0])])
@pytest.mark.parametrize("shape", [(6, 256), (2, 6, 128)])
def test_rows_are_the_chosen_output_rows(index: slice | np.ndarray, shape: tuple[int]) -> None:
    w = random_affine(*shape, two_levels=True)
    assert np.array_equal(w.rows(index).to_float32(), w.to_float32()[..., index, :])
    dense = Dense(w.to_float32(), "float32")
    assert np.array_equal(dense.rows(index).data, dense.data[..., index, :])


def test_rows_of_a_vector_are_its_entries() -> None:
    assert Dense(np.arange(5, dtype=np.float32), "float32").rows(slice(2, 4)).data.tolist() == [
        2,
        3,
    ]


@pytest.mark.parametrize("two_levels", [False, True])
def test_columns_are_the_chosen_inputs_where_whole_groups_move(two_levels: bool) -> None:
    w = random_affine(2, 6, 512, two_levels=two_levels)
    index = np.arange(512).reshape(2, 4, 64).swapaxes(0, 1).reshape(-1)
    moved = w.columns(index)
    assert np.array_equal(moved.to_float32(), w.to_float32()[..., index])
    assert form_of(moved) == form_of(w).with_columns_moved()
    dense = Dense(w.to_float32(), "float32")
    assert np.array_equal(dense.columns(index).data, dense.data[..., index])


@pytest.mark.parametrize("index", [np.arange(128) ^ 1, np.roll(np.arange(128), 8)])
def test_columns_that_tear_a_group_apart_are_refused(index: np.ndarray) -> None:
    with pytest.raises(ValueError, match="torn apart"):
        random_affine(6, 128).columns(index)


def test_bfloat16_widens_exactly() -> None:
    bits = np.array([0x3F80, 0xC000, 0x0001, 0x7F7F], np.uint16)
    assert Dense(bits, "bfloat16").to_float32().view(np.uint32).tolist() == [
        bit << 16 for bit in bits.tolist()
    ]


def test_an_empty_matrix_stays_empty() -> None:
    assert random_affine(0, 64).to_float32().shape == (0, 64)


def test_widening_needs_little_more_than_its_result() -> None:
    w = random_affine(2048, 2048)
    tracemalloc.start()
    result = w.to_float32()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < result.nbytes * 1.25
