"""GGUF headers: what is read, and how damage is named."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from localllm.checkpoint import open_checkpoint
from localllm.errors import CheckpointError, UnsupportedModel
from tests.checkpoint.files import (
    HALVES,
    key,
    random_blocks,
    raw_gguf,
    tensor_info,
    text,
    write_gguf,
)

F32_BYTES = 32 * 2 * 4


def opened(tmp_path: Path, content: bytes) -> Any:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return open_checkpoint(path)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def test_metadata_of_every_type_is_read(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        for bits in (8, 16, 32, 64):
            getattr(writer, f"add_uint{bits}")(f"u{bits}", (1 << bits) - 1)
            getattr(writer, f"add_int{bits}")(f"i{bits}", -(1 << (bits - 1)))
        writer.add_float32("f32", 0.5)
        writer.add_float64("f64", 1e300)
        writer.add_bool("yes", True)
        writer.add_string("words", "héllo\nworld")
        writer.add_array("strings", ["a", "", "日本"])
        writer.add_array("numbers", [1, -2, 3])
        writer.add_array("floats", [0.5, -1.5])
        writer.add_array("flags", [True, False])

    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", {}, fill)).config
    for bits in (8, 16, 32, 64):
        assert config[f"u{bits}"] == (1 << bits) - 1
        assert config[f"i{bits}"] == -(1 << (bits - 1))
    assert (config["f32"], config["f64"], config["yes"]) == (0.5, 1e300, True)
    assert config["words"] == "héllo\nworld"
    assert config["strings"] == ["a", "", "日本"]
    assert config["numbers"] == [1, -2, 3]
    assert config["floats"] == [0.5, -1.5]
    assert config["flags"] == [True, False]
    assert config["general.architecture"] == "llama"
    assert config.get("absent") is None
    assert set(config) >= {"u8", "strings"}


def test_arrays_in_arrays_are_lists_of_lists(tmp_path: Path) -> None:
    nested = array(9, 2, array(5, 2, struct.pack("<2i", 1, 2)) + array(8, 1, text("x")))
    assert opened(tmp_path, raw_gguf(keys=[key("k", 9, nested)])).config["k"] == [[1, 2], ["x"]]


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3_are_read(tmp_path: Path, version: int) -> None:
    values = np.arange(64, dtype="<f4")
    checkpoint = opened(tmp_path, raw_gguf([tensor_info()], [], values.tobytes(), version=version))
    assert checkpoint.format == "gguf"
    assert list(checkpoint.names()) == ["w"]
    assert "w" in checkpoint
    assert checkpoint.shape("w") == (2, 32)  # row-major, the file says 32, 2
    assert checkpoint.kind("w") == "F32"
    assert checkpoint.nbytes("w") == F32_BYTES
    assert np.array_equal(checkpoint.tensor("w").data, values.reshape(2, 32))


def test_an_alignment_of_its_own_is_honoured(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = {"a": np.ones((1, 3), np.float32), "b": np.full((2, 5), 2, np.float16)}
    write_gguf(path, tensors, lambda writer: writer.add_custom_alignment(256))
    checkpoint = open_checkpoint(path)
    for name, expected in tensors.items():
        assert np.array_equal(checkpoint.tensor(name).data, expected)


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    tokens = [f"token {n}" for n in range(262_144)]
    keys = [
        key("tokens", 9, array(8, len(tokens), b"".join(text(t) for t in tokens))),
        key("scores", 9, array(6, len(tokens), np.arange(len(tokens), dtype="<f4").tobytes())),
    ]
    content = raw_gguf(keys=keys)
    start = time.process_time()
    config = opened(tmp_path, content).config
    read = config["tokens"], config["scores"]
    assert time.process_time() - start < 1.0  # some 0.1 s on an idle machine
    assert read[0] == tokens
    assert read[1][-1] == len(tokens) - 1
    assert config["tokens"] is read[0]  # decoded once


BAD_HEADERS = {
    "magic": (raw_gguf(magic=b"GGML"), "not a GGUF file"),
    "json answer": (b'{"error": "not found"}', "not a GGUF file"),
    "version 1": (raw_gguf(version=1), "version 1"),
    "version 4": (raw_gguf(version=4), "version 4"),
    "big endian": (raw_gguf(version=3 << 24), "big-endian"),
    "many tensors": (raw_gguf(tensor_count=1 << 60), "claims 1152921504606846976 tensors"),
    "some tensors too many": (raw_gguf(tensor_count=100), "claims 100 tensors"),
    "many keys": (raw_gguf(key_count=1 << 40), "claims 1099511627776 metadata keys"),
    "long key": (
        raw_gguf(keys=[struct.pack("<Q", 1 << 62)], data=b"\0" * 64),
        "metadata key 0 reaches beyond",
    ),
    "long string": (
        raw_gguf(keys=[key("k", 8, struct.pack("<Q", (1 << 64) - 1))]), "'k' reaches beyond",
    ),
    "giant array": (raw_gguf(keys=[key("k", 9, array(4, 1 << 61))]), "'k' claims"),
    "long array": (raw_gguf(keys=[key("k", 9, array(4, 1000))]), "'k' reaches beyond"),
    "long array of strings": (
        raw_gguf(keys=[key("k", 9, array(8, 2, struct.pack("<QQ", 1 << 63, 0)))]),
        "'k' reaches beyond",
    ),
    "value type": (raw_gguf(keys=[key("k", 13, b"")], data=b"\0" * 64), "unknown value type 13"),
    "array type": (raw_gguf(keys=[key("k", 9, array(77, 0))]), "'k' is an array of unknown type"),
    "nesting": (
        raw_gguf(keys=[key("k", 9, array(9, 1) * 5 + array(0, 0))]), "'k' nests arrays",
    ),
    "key twice": (raw_gguf(keys=[key("k", 4, u32(1))] * 2), "'k' is listed twice"),
    "key not text": (
        raw_gguf(keys=[key("k", 4, u32(1)).replace(b"k", b"\xff")]), "not valid UTF-8",
    ),
    "key with escapes": (raw_gguf(keys=[key("\x1b[31m", 4, u32(1))]), "unprintable"),
    "alignment 0": (raw_gguf(keys=[key("general.alignment", 4, u32(0))]), "general.alignment is 0"),
    "alignment 24": (raw_gguf(keys=[key("general.alignment", 4, u32(24))]), "alignment is 24"),
    "alignment huge": (raw_gguf(keys=[key("general.alignment", 4, u32(1 << 31))]), "alignment is"),
    "alignment text": (raw_gguf(keys=[key("general.alignment", 8, text("x"))]), "alignment is 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_named(tmp_path: Path, case: str) -> None:
    content, message = BAD_HEADERS[case]
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, content)
    assert message in str(caught.value)
    assert "model.gguf" in str(caught.value)


def two(second: bytes) -> bytes:
    return raw_gguf([tensor_info("one"), second], data=b"\0" * 2 * F32_BYTES)


BAD_TENSORS = {
    "outside": (raw_gguf([tensor_info()], data=b"\0" * (F32_BYTES - 1)), "'w' ends at byte"),
    "far outside": (raw_gguf([tensor_info(offset=1 << 62)]), "'w' ends at byte"),
    "giant": (raw_gguf([tensor_info(dims=(1 << 63, 1 << 63, 1 << 63, 1 << 63))]), "'w' ends at"),
    "overlap": (two(tensor_info("two", offset=32)), "'one' and 'two' overlap"),
    "same place": (two(tensor_info("two")), "'one' and 'two' overlap"),
    "twice": (two(tensor_info("one", offset=F32_BYTES)), "'one' is listed twice"),
    "unaligned": (two(tensor_info("two", offset=F32_BYTES + 4)), "'two' starts at 260"),
    "dimensions": (raw_gguf([tensor_info(dims=(1, 1, 1, 1, 1))]), "'w' has 5 dimensions"),
    "many dimensions": (raw_gguf([text("w") + u32(1 << 31) + b"\0" * 64]), "2147483648 dimensions"),
    "empty": (raw_gguf([tensor_info(dims=(32, 0))]), "'w' is empty"),
    "type": (raw_gguf([tensor_info(kind=99)]), "'w' has unknown type number 99"),
    "withdrawn type": (raw_gguf([tensor_info(kind=31)]), "'w' has type Q4_0_4_4, withdrawn"),
    "half a block": (raw_gguf([tensor_info(dims=(48, 2), kind=2)]), "'w' has rows of 48 weights"),
    "half a K block": (raw_gguf([tensor_info(dims=(32, 8), kind=12)]), "blocks of 256"),
    "name not text": (raw_gguf([tensor_info().replace(b"w", b"\xff")]), "name of tensor 0"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_bad_tensor_is_named(tmp_path: Path, case: str) -> None:
    content, message = BAD_TENSORS[case]
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, content)
    assert message in str(caught.value)
    assert "model.gguf" in str(caught.value)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    keys = [key("k", 8, text("value")), key("a", 9, array(8, 2, text("x") + text("yy")))]
    whole = raw_gguf([tensor_info()], keys, b"\1" * F32_BYTES)
    opened(tmp_path, whole)
    for size in range(len(whole)):
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            opened(tmp_path, whole[:size])


@pytest.mark.parametrize(
    ("number", "name"), [(23, "IQ4_XS"), (34, "TQ1_0"), (26, "I32"), (15, "Q8_K")]
)
def test_types_not_read_are_named_with_those_that_are(
    tmp_path: Path, number: int, name: str
) -> None:
    info = tensor_info("blk.0.w", dims=(256, 1), kind=number)
    checkpoint = opened(tmp_path, raw_gguf([info], data=b"\0" * 2048))
    assert checkpoint.kind("blk.0.w") == name
    with pytest.raises(UnsupportedModel) as caught:
        checkpoint.tensor("blk.0.w")
    for part in ("model.gguf", "'blk.0.w'", name, "Q4_K", "BF16"):
        assert part in str(caught.value)


def test_a_token_that_is_not_text_is_an_error_naming_the_key(tmp_path: Path) -> None:
    tokens = array(8, 2, text("fine") + text(b"\xff\xfe"))
    config = opened(tmp_path, raw_gguf(keys=[key("tokens", 9, tokens)])).config
    with pytest.raises(CheckpointError, match=r"model\.gguf.*'tokens'.*element 1"):
        config["tokens"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_weights_that_are_not_finite_are_an_error(tmp_path: Path, value: float, dtype: str) -> None:
    values = np.ones((3, 5), dtype)
    values[2, 3] = value
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", {"blk.0.w": values}))
    with pytest.raises(CheckpointError, match=r"model\.gguf.*'blk\.0\.w'.*NaN or infinite"):
        checkpoint.tensor("blk.0.w")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_K", "Q6_K"])
def test_scales_that_are_not_finite_are_an_error(tmp_path: Path, kind: str) -> None:
    raw = random_blocks(kind, 2, 2)
    at = HALVES[kind][-1]
    raw[1, at : at + 2] = np.array([0x7C00], np.uint16).view(np.uint8)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", {"w": (raw, kind)}))
    with pytest.raises(CheckpointError, match=r"model\.gguf.*'w'.*NaN or infinite"):
        checkpoint.tensor("w")


def test_a_missing_tensor_is_named_with_close_ones(tmp_path: Path) -> None:
    tensors = {name: np.ones(3, np.float32) for name in ("blk.0.attn_q.weight", "output.weight")}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", tensors))
    assert "blk.0.attn_k.weight" not in checkpoint
    for ask in (checkpoint.tensor, checkpoint.shape, checkpoint.kind, checkpoint.nbytes):
        with pytest.raises(CheckpointError) as caught:
            ask("blk.0.attn_k.weight")
        assert "'blk.0.attn_k.weight'; close names: blk.0.attn_q.weight" in str(caught.value)


def test_views_outlive_the_checkpoint(tmp_path: Path) -> None:
    large = np.ones((1 << 10, 1 << 11), np.float32)
    tensors = {"small": np.ones((2, 3), np.float32), "large": large}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    weights = {name: checkpoint.tensor(name) for name in tensors}
    checkpoint.close()
    checkpoint.close()
    assert weights["small"].to_float32().sum() == 6
    assert weights["large"].to_float32().sum() == large.size
