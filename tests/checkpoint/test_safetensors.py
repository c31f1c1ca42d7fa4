"""Safetensors files: reading, refusing, writing."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from localllm.checkpoint import Dense, open_checkpoint
from localllm.checkpoint.safetensors import SafetensorsFile, write_safetensors
from localllm.errors import CheckpointError, UnsupportedModel
from tests.checkpoint.files import raw_safetensors

RNG = np.random.default_rng(2)


def opened(tmp_path: Path, content: bytes) -> Any:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return open_checkpoint(path)


def entry(dtype: Any = "F32", shape: Any = (2, 3), place: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


def with_tensors(data: int = 24, **tensors: Any) -> bytes:
    return raw_safetensors(json.dumps(tensors), b"\0" * data)


def test_files_of_the_safetensors_package_are_read_exactly(tmp_path: Path) -> None:
    tensors = {
        "a.weight": RNG.standard_normal((4, 6)).astype(np.float32),
        "b.weight": RNG.standard_normal((3, 2, 5)).astype(np.float16),
        "scalar": np.array(2.5, np.float32),
        "nothing": np.empty((0, 4), np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "safetensors"
    assert checkpoint.config == {"model_type": "llama"}
    assert set(checkpoint.names()) == set(tensors)
    for name, expected in tensors.items():
        weights = checkpoint.tensor(name)
        assert isinstance(weights, Dense)
        assert checkpoint.shape(name) == weights.shape == expected.shape
        assert checkpoint.nbytes(name) == expected.nbytes
        assert checkpoint.kind(name) == {"float32": "F32", "float16": "F16"}[weights.dtype]
        assert np.array_equal(weights.data, expected)


def test_bfloat16_written_by_mlx_keeps_its_bits(tmp_path: Path) -> None:
    weights = mx.array(RNG.standard_normal((4, 6)).astype(np.float32)).astype(mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"w": weights})
    (tmp_path / "config.json").write_text("{}")
    got = open_checkpoint(tmp_path).tensor("w")
    assert isinstance(got, Dense)
    assert got.dtype == "bfloat16"
    assert np.array_equal(got.to_float32(), np.array(weights.astype(mx.float32)))


def test_large_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    weights = np.ones((1 << 11, 1 << 11), np.float16)
    write_safetensors(tmp_path / "model.safetensors", {"w": weights})
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    tracemalloc.start()
    read = checkpoint.tensor("w")
    assert tracemalloc.get_traced_memory()[1] < weights.nbytes / 4
    tracemalloc.stop()
    assert np.array_equal(read.to_float32(), weights)


def test_values_are_the_same_wherever_they_lie(tmp_path: Path) -> None:
    values = np.arange(6, dtype="<f4")
    for pad in range(4):
        header = json.dumps({"w": entry()}) + " " * pad
        weights = opened(tmp_path, raw_safetensors(header, values.tobytes())).tensor("w").data
        assert np.array_equal(weights, values.reshape(2, 3))
        assert weights.flags.aligned
        assert not weights.flags.writeable


BAD = {
    "short": (b"\0" * 7, "too few"),
    "header size": (raw_safetensors("{}", size=1 << 62), "claims a header of 4611686018427387904"),
    "header beyond": (raw_safetensors("{}", size=3), "claims a header of 3 bytes"),
    "no JSON": (raw_safetensors("{'w': 1}"), "not valid JSON"),
    "not UTF-8": (raw_safetensors(b'{"\xff": 1}'), "not valid JSON"),
    "nested": (raw_safetensors("[" * 100_000), "not valid JSON"),
    "huge number": (raw_safetensors('{"w": ' + "9" * 5000 + "}"), "not valid JSON"),
    "a list": (raw_safetensors("[]"), "not a JSON object"),
    "tensor twice": (raw_safetensors('{"w": {}, "v": 1, "w": {}}'), "'w' twice"),
    "not described": (with_tensors(w=3), "'w' has no description"),
    "unknown type": (with_tensors(w=entry("F33")), "'w' has unknown type 'F33'"),
    "no type": (with_tensors(w=entry(None)), "'w' has unknown type None"),
    "shape": (with_tensors(w=entry(shape="abc")), "'w' has an impossible shape"),
    "negative": (with_tensors(w=entry(shape=[-2, -3])), "'w' has an impossible shape"),
    "fraction": (with_tensors(w=entry(shape=[2.0, 3])), "'w' has an impossible shape"),
    "truth": (with_tensors(w=entry(shape=[True, 6])), "'w' has an impossible shape"),
    "giant": (with_tensors(w=entry(shape=[1 << 80])), "'w' has an impossible shape"),
    "many dimensions": (with_tensors(w=entry(shape=[1] * 70)), "'w' has an impossible shape"),
    "giant but empty": (
        with_tensors(data=0, w=entry(shape=[1 << 40, 1 << 40, 0], place=[0, 0])),
        "'w' has an impossible shape",
    ),
    "offsets": (with_tensors(w=entry(place=[0])), "'w' has impossible data offsets"),
    "backwards": (with_tensors(w=entry(place=[24, 0])), "'w' has impossible data offsets"),
    "outside": (with_tensors(data=23, w=entry()), "'w' ends at byte"),
    "size": (with_tensors(w=entry(shape=[2, 2])), "'w' has 24 bytes; F32 of shape [2, 2] needs 16"),
    "overlap": (with_tensors(40, w=entry(), v=entry(place=[16, 40])), "'w' and 'v' overlap"),
    "same place": (with_tensors(w=entry(), v=entry()), "overlap"),
    "gap": (with_tensors(48, w=entry(place=[24, 48])), "24 bytes before tensor 'w'"),
    "rest": (with_tensors(25, w=entry()), "1 bytes at the end"),
    "escapes": (with_tensors(**{"\x1b[2J": entry()}), "unprintable"),
    "half a code point": (with_tensors(**{"\ud800": entry()}), "unprintable"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, content)
    assert message in str(caught.value)
    assert "model.safetensors" in str(caught.value)
    str(caught.value).encode()  # can be printed


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    whole = with_tensors(w=entry())
    opened(tmp_path, whole)
    for size in range(len(whole)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            opened(tmp_path, whole[:size])


@pytest.mark.parametrize(
    ("dtype", "size"), [("I64", 48), ("F64", 48), ("U8", 6), ("F8_E4M3", 6), ("F4", 3), ("U32", 24)]
)
def test_other_types_are_listed_and_refused_as_weights(
    tmp_path: Path, dtype: str, size: int
) -> None:
    checkpoint = opened(tmp_path, with_tensors(size, w=entry(dtype, place=[0, size])))
    assert checkpoint.kind("w") == dtype
    with pytest.raises(UnsupportedModel, match=rf"model\.safetensors: tensor 'w' is {dtype}"):
        checkpoint.tensor("w")


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80, 0xFFFF])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_that_are_not_finite_are_an_error(tmp_path: Path, bits: int, dtype: str) -> None:
    values = np.zeros(300_000, np.uint16)
    values[-1] = bits  # far from the start
    data = values if dtype == "bfloat16" else (values.astype(np.uint32) << 16).view(np.float32)
    write_safetensors(tmp_path / "model.safetensors", {"w": Dense(data, dtype)})  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*'w'.*NaN or infinite"):
        open_checkpoint(tmp_path).tensor("w")


def test_the_largest_finite_values_pass(tmp_path: Path) -> None:
    tensors = {
        "f32": np.array([np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal]),
        "f16": np.array([65504, -65504, 6e-8], np.float16),
    }
    tensors["f32"] = tensors["f32"].astype(np.float32)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text("{}")
    for name, expected in tensors.items():
        assert np.array_equal(open_checkpoint(tmp_path).tensor(name).data, expected)


def test_what_is_written_the_safetensors_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    tensors = {
        "odd": RNG.integers(0, 255, 3, dtype=np.uint8),
        "w": RNG.standard_normal((4, 3)).astype(np.float32),
        "h": np.asfortranarray(RNG.standard_normal((4, 3)).astype(np.float16)),
        "packed": RNG.integers(0, 1 << 32, (2, 4), dtype=np.uint32),
        "big": np.arange(3, dtype=">f4"),
        "none": np.empty((0, 2), np.float32),
        "scalar": np.array(1.5, np.float32),
    }
    write_safetensors(path, tensors, {"made": "here"})
    got = load_file(path)
    assert {name: got[name].tolist() for name in got} == {n: t.tolist() for n, t in tensors.items()}
    header = path.read_bytes()[8:]
    assert json.JSONDecoder().raw_decode(header.decode(errors="replace"))[0]["__metadata__"] == {
        "made": "here"
    }
    assert all(t.offset % 4 == 0 for t in SafetensorsFile(path).tensors.values() if t.name != "odd")


def test_bfloat16_is_written_as_such(tmp_path: Path) -> None:
    bits = RNG.integers(0, 0x7F00, (2, 3), dtype=np.uint16)
    write_safetensors(tmp_path / "w.safetensors", {"w": Dense(bits, "bfloat16")})
    got = mx.load(str(tmp_path / "w.safetensors"))["w"]
    assert got.dtype == mx.bfloat16
    assert np.array_equal(np.array(got.view(mx.uint16)), bits)


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"w": np.ones(3, np.float32)})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"w\.safetensors: cannot be written: No space"):
        write_safetensors(path, {"w": np.zeros(3, np.float32)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_array_of_unknown_type_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'w' has type complex64"):
        write_safetensors(tmp_path / "w.safetensors", {"w": np.ones(3, np.complex64)})
