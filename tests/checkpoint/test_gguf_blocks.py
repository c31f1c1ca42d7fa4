"""Every block format against the `gguf` package's own dequantization: bit for bit, no tolerance.

It can be exact: a two-level scale is a float16 times an integer below 256, which float32 holds,
and both sides then round one product and one sum in the same order.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.checkpoint import Affine, Dense, open_checkpoint
from localllm.checkpoint.gguf_blocks import FORMATS, to_affine
from localllm.checkpoint.gguf_types import TYPES
from localllm.errors import CheckpointError, UnsupportedModel
from tests.checkpoint.files import HALVES, random_blocks, write_gguf

# bits, group, zero point
FORM = {
    "Q4_0": (4, 32, 8), "Q4_1": (4, 32, 0), "Q5_0": (5, 32, 16), "Q5_1": (5, 32, 0),
    "Q8_0": (8, 32, 128), "Q2_K": (2, 16, 0), "Q3_K": (3, 16, 4), "Q4_K": (4, 32, 0),
    "Q5_K": (5, 32, 0), "Q6_K": (6, 16, 32), "MXFP4": (5, 32, 12), "NVFP4": (5, 16, 12),
}  # fmt: skip


def same_bits(got: np.ndarray, expected: np.ndarray) -> bool:
    return got.shape == expected.shape and np.array_equal(
        got.view(np.uint32), np.asarray(expected, np.float32).view(np.uint32)
    )


def test_the_type_table_is_that_of_the_gguf_package() -> None:
    theirs = {
        int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind])
        for kind in Kind
        if kind in gguf.GGML_QUANT_SIZES
    }
    ours = {number: (t.name, t.block, t.nbytes) for number, t in TYPES.items()}
    assert {number: ours.get(number) for number in theirs} == theirs


def test_every_layout_fills_its_block() -> None:
    sizes = {t.name: t.nbytes for t in TYPES.values()}
    assert {n: f.layout.itemsize for n, f in FORMATS.items()} == {n: sizes[n] for n in FORMATS}


@pytest.mark.parametrize("kind", HALVES)
def test_any_block_means_exactly_what_ggml_says(tmp_path: Path, kind: str) -> None:
    # More than one conversion step, and a last one that is not full.
    raw = random_blocks(kind, rows=37, blocks=90)
    path = write_gguf(tmp_path / "m.gguf", {"w": (raw, kind)})
    weights = open_checkpoint(path).tensor("w")
    assert isinstance(weights, Affine)
    assert (weights.bits, weights.group, weights.zero_point) == FORM[kind]
    assert same_bits(weights.to_float32(), gguf.quants.dequantize(raw, Kind[kind]))


def test_nvfp4_means_what_ggml_writes_out() -> None:
    """Every scale, every nibble, by the definition of ggml-common.h and ggml-impl.h."""
    values = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]  # twice E2M1

    def scale(byte: int) -> float:
        exponent, mantissa = byte >> 3 & 15, byte & 7
        if byte in (0, 0x7F):
            return 0.0
        if exponent == 0:
            return mantissa * 2.0**-9 * 0.5
        return (1 + mantissa / 8) * 2.0 ** (exponent - 7) * 0.5

    blocks = [
        bytes([d, (d + 1) % 256, 0, 0x7F]) + bytes((16 * j + (j + d) % 16) % 256 for j in range(32))
        for d in range(256)
    ]
    expected = np.empty((256, 64), np.float32)
    for at, block in enumerate(blocks):
        for sub in range(4):
            for j in range(8):
                byte = block[4 + 8 * sub + j]
                expected[at, 16 * sub + j] = values[byte & 15] * scale(block[sub])
                expected[at, 16 * sub + 8 + j] = values[byte >> 4] * scale(block[sub])
    form = next(t for t in TYPES.values() if t.name == "NVFP4")
    stored = b"".join(blocks)
    weights = to_affine(form, (256, 64), lambda at, size: stored[at : at + size])
    assert np.array_equal(weights.to_float32(), expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(kind for kind in HALVES if HALVES[kind])))
def test_extreme_bytes_are_exact_too(data: st.DataObject, kind: str) -> None:
    raw = random_blocks(kind, 1, 1)
    fill = data.draw(st.sampled_from([0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0, 0x55]))
    halves = data.draw(st.sampled_from([b"\x00\x00", b"\xff\x7b", b"\x01\x80", b"\x00\x80"]))
    raw[:] = fill
    for at in HALVES[kind]:
        raw[0, at : at + 2] = np.frombuffer(halves, np.uint8)
    form = next(t for t in TYPES.values() if t.name == kind)
    stored = raw.tobytes()
    weights = to_affine(form, (1, form.block), lambda at, size: stored[at : at + size])
    with np.errstate(all="ignore"):
        assert same_bits(weights.to_float32(), gguf.quants.dequantize(raw, Kind[kind]))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_weights_quantized_by_the_gguf_package_are_read_exactly(tmp_path: Path, kind: str) -> None:
    dense = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    raw = gguf.quants.quantize(dense, Kind[kind])
    path = write_gguf(tmp_path / "m.gguf", {"w": (raw, kind)})
    got = open_checkpoint(path).tensor("w").to_float32()
    assert same_bits(got, gguf.quants.dequantize(raw, Kind[kind]))
    assert np.abs(got - dense).max() < 0.3  # and they are the weights that were meant


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_K"])
def test_experts_stay_a_stack_of_matrices(tmp_path: Path, kind: str) -> None:
    raw = random_blocks(kind, rows=12, blocks=2).reshape(3, 4, -1)
    path = write_gguf(tmp_path / "m.gguf", {"experts": (raw, kind)})
    weights = open_checkpoint(path).tensor("experts")
    width = 2 * gguf.GGML_QUANT_SIZES[Kind[kind]][0]
    assert weights.shape == (3, 4, width)
    assert same_bits(weights.to_float32(), gguf.quants.dequantize(raw, Kind[kind]))
    part = weights.rows(np.array([2, 0])).to_float32()
    assert same_bits(part, weights.to_float32()[:, [2, 0]])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_a_quantized_vector_comes_dense(tmp_path: Path, kind: str) -> None:
    raw = random_blocks(kind, rows=1, blocks=3)[0]
    path = write_gguf(tmp_path / "m.gguf", {"bias": (raw, kind)})
    bias = open_checkpoint(path).tensor("bias")
    assert isinstance(bias, Dense)
    assert same_bits(bias.to_float32(), gguf.quants.dequantize(raw, Kind[kind]))


def test_converted_weights_are_hardly_larger_than_in_the_file(tmp_path: Path) -> None:
    tensors = {kind: (random_blocks(kind, 4, 3), kind) for kind in HALVES}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    for kind in HALVES:
        # The multipliers of K-quants, 4 or 6 bits in the file, take a byte each.
        # E2M1's values are integers of 5 bits, and NVFP4's scales of a byte take two.
        most = {"Q2_K": 1.2, "MXFP4": 1.3, "NVFP4": 1.34}.get(kind, 1.04)
        assert checkpoint.tensor(kind).nbytes <= checkpoint.nbytes(kind) * most


@pytest.mark.parametrize("exponent", [1, 103, 144, 254])
def test_an_mxfp4_scale_that_cannot_be_held_exactly_is_refused(
    tmp_path: Path, exponent: int
) -> None:
    raw = random_blocks("MXFP4", 1, 2)
    raw[0, 17] = exponent
    path = write_gguf(tmp_path / "m.gguf", {"w": (raw, "MXFP4")})
    with pytest.raises(UnsupportedModel, match="MXFP4"):
        open_checkpoint(path).tensor("w")


def test_an_mxfp4_scale_that_is_no_number_is_told(tmp_path: Path) -> None:
    raw = random_blocks("MXFP4", 1, 2)
    raw[0, 17] = 255
    path = write_gguf(tmp_path / "m.gguf", {"w": (raw, "MXFP4")})
    with pytest.raises(CheckpointError, match="'w' has scales that are NaN"):
        open_checkpoint(path).tensor("w")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_floating_point_tensors_are_read_as_they_are(tmp_path: Path, dtype: type) -> None:
    dense = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    weights = open_checkpoint(write_gguf(tmp_path / "m.gguf", {"w": dense})).tensor("w")
    assert isinstance(weights, Dense)
    assert weights.dtype == np.dtype(dtype).name
    assert np.array_equal(weights.data, dense)


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    dense = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    raw = gguf.quants.quantize(dense, Kind.BF16)
    weights = open_checkpoint(write_gguf(tmp_path / "m.gguf", {"w": (raw, "BF16")})).tensor("w")
    assert isinstance(weights, Dense)
    assert weights.dtype == "bfloat16"
    assert same_bits(weights.to_float32(), gguf.quants.dequantize(raw, Kind.BF16))
