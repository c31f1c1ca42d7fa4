"""Codes in a bit stream: MLX's packing for every width."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from localllm.checkpoint.packing import unpack_codes
from localllm.checkpoint.tensor import Affine, GroupValues, pack_codes

WIDTHS = range(1, 9)
MLX_WIDTHS = (2, 3, 4, 5, 6, 8)


def random_codes(bits: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 1 << bits, shape, dtype=np.uint8)


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """The definition, bit by bit."""
    single = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    rows = single.reshape(*codes.shape[:-1], -1)
    return np.packbits(rows, axis=-1, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(32,), (5, 96), (2, 3, 64), (3, 70_016)])
def test_a_code_stands_at_its_own_bits_of_the_row(bits: int, shape: tuple[int, ...]) -> None:
    codes = random_codes(bits, *shape)
    assert np.array_equal(pack_codes(codes, bits), bit_stream(codes, bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpacking_gives_back_what_was_packed(bits: int) -> None:
    codes = random_codes(bits, 3, 7, 160)
    assert np.array_equal(unpack_codes(pack_codes(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_row_may_be_as_short_as_one_word(bits: int) -> None:
    codes = random_codes(bits, 3, 32 // bits)
    assert np.array_equal(pack_codes(codes, bits), bit_stream(codes, bits))


def test_no_rows_pack_to_no_rows() -> None:
    packed = pack_codes(np.empty((0, 64), np.uint8), 3)
    assert packed.shape == (0, 6)
    assert unpack_codes(packed, 3).shape == (0, 64)


def test_strided_views_are_packed_by_value() -> None:
    codes = random_codes(4, 8, 128)[::2, ::2]
    assert np.array_equal(unpack_codes(pack_codes(codes, 4), 4), codes)


@pytest.mark.parametrize(
    ("codes", "bits"),
    [
        (np.full((1, 32), 16, np.uint8), 4),  # too large
        (np.zeros((1, 20), np.uint8), 3),  # not whole words
        (np.zeros((1, 32), np.int32), 4),
        (np.zeros((1, 32), np.uint8), 9),
    ],
)
def test_what_cannot_be_packed_is_refused(codes: np.ndarray, bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        pack_codes(codes, bits)


@pytest.mark.parametrize("bits", MLX_WIDTHS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_codes_and_weights_are_those_of_mlx(bits: int, group: int, experts: tuple[int]) -> None:
    weights = np.random.default_rng(0).standard_normal((*experts, 8, 256)).astype(np.float32)
    packed, scales, biases = mx.quantize(mx.array(weights), group_size=group, bits=bits)
    affine = Affine(
        np.array(packed),
        bits,
        group,
        GroupValues(np.array(scales)),
        GroupValues(np.array(biases)),
    )
    assert affine.shape == weights.shape
    assert np.array_equal(pack_codes(affine.unpack(), bits), np.array(packed))
    expected = np.array(
        mx.dequantize(packed, scales, biases, group_size=group, bits=bits), np.float64
    )
    # Ours rounds the product and the sum; MLX may fuse the two. Half an ulp of each at most.
    largest = np.abs(expected).max()
    assert np.abs(affine.to_float32() - expected).max() <= 2 * np.spacing(np.float32(largest))
