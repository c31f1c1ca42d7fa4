"""Folders quantized by MLX: every width and group, mixed layers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from localllm.checkpoint import Affine, Checkpoint, Dense, open_checkpoint
from localllm.checkpoint.form import form_of
from localllm.errors import CheckpointError, UnsupportedModel

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
RNG = np.random.default_rng(3)


def quantized(
    name: str,
    bits: int = 4,
    group: int = 64,
    dtype: str = "float16",
    shape: tuple[int, ...] = (8, 256),
) -> dict[str, mx.array]:
    weights = mx.array(RNG.standard_normal(shape).astype(np.float32)).astype(DTYPES[dtype])
    parts = mx.quantize(weights, group_size=group, bits=bits)
    return dict(zip((f"{name}.weight", f"{name}.scales", f"{name}.biases"), parts, strict=True))


def folder(
    path: Path, tensors: dict[str, mx.array], quantization: Any, key: str = "quantization"
) -> Path:
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    (path / "config.json").write_text(json.dumps({key: quantization}))
    return path


def by_mlx(tensors: dict[str, mx.array], name: str, bits: int, group: int) -> np.ndarray:
    """MLX's own weights in float32, from scales widened without loss."""
    scales, biases = (tensors[f"{name}.{side}"].astype(mx.float32) for side in ("scales", "biases"))
    weight = tensors[f"{name}.weight"]
    return np.array(mx.dequantize(weight, scales, biases, group_size=group, bits=bits))


def assert_same(checkpoint: Checkpoint, name: str, expected: np.ndarray) -> None:
    weights = checkpoint.tensor(f"{name}.weight")
    assert isinstance(weights, Affine)
    assert checkpoint.shape(f"{name}.weight") == weights.shape == expected.shape
    # MLX may fuse the product and the sum: two roundings of ours against one of theirs.
    bound = 2 * np.spacing(np.abs(expected).max())
    assert np.abs(weights.to_float32() - expected).max() <= bound


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_group_and_type_is_read(
    tmp_path: Path, bits: int, group: int, dtype: str
) -> None:
    tensors = quantized("l", bits, group, dtype)
    checkpoint = open_checkpoint(folder(tmp_path, tensors, {"bits": bits, "group_size": group}))
    assert checkpoint.format == "mlx"
    assert checkpoint.kind("l.weight") == f"affine {bits}-bit/{group}"
    assert checkpoint.nbytes("l.weight") == sum(t.nbytes for t in tensors.values())
    assert_same(checkpoint, "l", by_mlx(tensors, "l", bits, group))
    weights = checkpoint.tensor("l.weight")
    assert isinstance(weights, Affine)
    assert np.array_equal(weights.codes, np.array(tensors["l.weight"]))
    scales = np.array(tensors["l.scales"].astype(mx.float32))
    assert np.array_equal(weights.scales.to_float32(), scales)


def test_experts_are_a_stack_of_matrices(tmp_path: Path) -> None:
    tensors = quantized("experts", 4, 32, "bfloat16", (3, 8, 64))
    checkpoint = open_checkpoint(folder(tmp_path, tensors, {"bits": 4, "group_size": 32}))
    assert_same(checkpoint, "experts", by_mlx(tensors, "experts", 4, 32))


def test_layers_may_differ(tmp_path: Path) -> None:
    tensors = {
        **quantized("general"),
        **quantized("wide", 8, 32),
        **quantized("also_wide", 6, 64),
        "plain.weight": mx.ones((4, 6)),
        "norm.weight": mx.ones((6,)),
        "other.biases": mx.ones((6,)),
    }
    settings = {
        "bits": 4,
        "group_size": 64,
        "mode": "affine",
        "wide": {"bits": 8, "group_size": 32},
        "also_wide.weight": {"bits": 6},
        "plain": False,
    }
    checkpoint = open_checkpoint(folder(tmp_path, tensors, settings))
    assert_same(checkpoint, "general", by_mlx(tensors, "general", 4, 64))
    assert_same(checkpoint, "wide", by_mlx(tensors, "wide", 8, 32))
    assert_same(checkpoint, "also_wide", by_mlx(tensors, "also_wide", 6, 64))
    assert isinstance(checkpoint.tensor("plain.weight"), Dense)
    # Scales and biases belong to their weight and are not listed; others are.
    names = {"general", "wide", "also_wide", "plain", "norm"}
    assert set(checkpoint.names()) == {f"{n}.weight" for n in names} | {"other.biases"}
    assert "wide.scales" not in checkpoint
    assert "other.biases" in checkpoint


def test_settings_under_the_second_name_are_mlx_too(tmp_path: Path) -> None:
    tensors = quantized("l")
    path = folder(tmp_path, tensors, {"bits": 4, "group_size": 64}, "quantization_config")
    assert open_checkpoint(path).format == "mlx"


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_other_methods_are_named(tmp_path: Path, method: str) -> None:
    settings = {"quant_method": method, "bits": 4, "group_size": 128}
    path = folder(tmp_path, quantized("l"), settings, "quantization_config")
    with pytest.raises(UnsupportedModel, match=rf"config\.json.* {method}"):
        open_checkpoint(path)


@pytest.mark.parametrize("where", ["general", "layer"])
def test_other_modes_are_named(tmp_path: Path, where: str) -> None:
    settings: dict[str, Any] = {"bits": 4, "group_size": 32}
    (settings if where == "general" else settings.setdefault("l", {}))["mode"] = "fp3"
    with pytest.raises(UnsupportedModel, match=r"config\.json.*fp3.*mxfp4, nvfp4, mxfp8"):
        open_checkpoint(folder(tmp_path, quantized("l"), settings))


@pytest.mark.parametrize(
    ("mode", "bits", "group"), [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
)
@pytest.mark.parametrize("shape", [(8, 256), (3, 5, 64)])
def test_small_floats_are_read_as_mlx_reads_them(
    tmp_path: Path, mode: str, bits: int, group: int, shape: tuple[int, ...]
) -> None:
    weights = RNG.standard_normal(shape).astype(np.float32)
    weights[..., :group] = 0
    parts = mx.quantize(mx.array(weights), group_size=group, bits=bits, mode=mode)
    expected = mx.dequantize(*parts, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
    settings = {"bits": bits, "group_size": group, "mode": mode}
    tensors = dict(zip(("l.weight", "l.scales"), parts, strict=True))
    checkpoint = open_checkpoint(folder(tmp_path, tensors, settings))
    assert list(checkpoint.names()) == ["l.weight"]
    assert checkpoint.shape("l.weight") == shape
    assert checkpoint.kind("l.weight") == mode
    tensor = checkpoint.tensor("l.weight")
    assert np.array_equal(tensor.to_float32(), np.array(expected))
    assert form_of(tensor) == checkpoint.form("l.weight")


@pytest.mark.parametrize(("key", "value"), [("bits", 8), ("group_size", 64)])
def test_small_floats_come_in_one_size(tmp_path: Path, key: str, value: int) -> None:
    settings = {"bits": 4, "group_size": 32, "mode": "mxfp4", key: value}
    with pytest.raises(CheckpointError, match="mxfp4 has 4 and 32"):
        open_checkpoint(folder(tmp_path, quantized("l"), settings))


def test_small_floats_of_other_shapes_than_their_scales_are_refused(tmp_path: Path) -> None:
    parts = mx.quantize(mx.zeros((4, 64)), group_size=32, bits=4, mode="mxfp4")
    tensors = {"l.weight": parts[0], "l.scales": parts[1][:, :1]}
    settings = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    checkpoint = open_checkpoint(folder(tmp_path, tensors, settings))
    with pytest.raises(CheckpointError, match=r"'l\.scales' has shape \[4, 1\]"):
        checkpoint.tensor("l.weight")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 7, "group_size": 64}, "bits = 7"),
        ({"bits": "4", "group_size": 64}, "bits = '4'"),
        ({"bits": 4}, "group_size = None"),
        ({"bits": 4, "group_size": 16}, "group_size = 16"),
        ({"bits": 4, "group_size": 64, "l": {"bits": 0}}, "quantization: l' has bits = 0"),
        ([4, 64], "'quantization' is not a JSON object"),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder(tmp_path, quantized("l"), settings))
    assert message in str(caught.value)


def test_empty_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no way of quantization that is known"):
        open_checkpoint(folder(tmp_path, quantized("l"), {}))


def broken(change: dict[str, mx.array | None]) -> dict[str, mx.array]:
    tensors: dict[str, mx.array | None] = {**quantized("l"), **change}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"l.scales": None}, {}, "'l.scales' is missing"),
        ({"l.biases": None}, {}, "'l.biases' is missing"),
        ({"l.scales": mx.ones((8, 3))}, {}, "'l.scales' has shape [8, 3]"),
        ({"l.biases": mx.ones((7, 4))}, {}, "'l.biases' has shape [7, 4]"),
        ({"l.weight": mx.ones((8, 33), mx.uint32)}, {}, "'l.weight' of shape [8, 33]"),
        ({"l.weight": mx.ones((32,), mx.uint32)}, {}, "'l.weight' of shape [32]"),
        ({}, {"bits": 8}, "'l.scales' has shape [8, 4]"),
        ({}, {"group_size": 32}, "'l.scales' has shape [8, 4]"),
        ({}, {"l": False}, "'l.weight' is packed, but config.json"),
        ({"l.scales": mx.full((8, 4), mx.nan)}, {}, "'l.weight' has scales that are NaN"),
        ({"l.biases": mx.full((8, 4), mx.inf)}, {}, "'l.weight' has scales that are NaN"),
        ({"l.scales": mx.full((8, 4), 3e38)}, {}, "'l.weight' has scales that are NaN"),
    ],
)
def test_what_does_not_fit_together_is_named(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    settings = {"bits": 4, "group_size": 64, **settings}
    checkpoint = open_checkpoint(folder(tmp_path, broken(change), settings))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.tensor("l.weight")
    assert message in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_scales_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    tensors = broken({"l.scales": mx.ones((8, 4), mx.uint8)})
    checkpoint = open_checkpoint(folder(tmp_path, tensors, {"bits": 4, "group_size": 64}))
    with pytest.raises(UnsupportedModel, match=r"'l\.scales' is U8"):
        checkpoint.tensor("l.weight")
