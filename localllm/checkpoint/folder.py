"""Folders as Hugging Face and MLX have them: config.json and safetensors, in shards or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from localllm.checkpoint import microscaling
from localllm.checkpoint.base import Format
from localllm.checkpoint.finite import require_finite
from localllm.checkpoint.form import AffineForm, DenseForm, Form, GroupForm
from localllm.checkpoint.mlx_quantization import Packing, read_quantization
from localllm.checkpoint.safetensors import SafetensorsFile, StoredTensor
from localllm.checkpoint.shards import INDEX, find_shards, read_index, read_json
from localllm.checkpoint.tensor import Affine, GroupValues, Tensor
from localllm.checkpoint.weight_file import missing_tensor
from localllm.errors import CheckpointError, UnsupportedModel

# What small floats become; see `microscaling`.
_FLOAT_FORMS: dict[str, Form] = {
    "mxfp4": AffineForm(microscaling.BITS, 32, GroupForm(2)),
    "nvfp4": AffineForm(microscaling.BITS, 16, GroupForm(2)),
    "mxfp8": DenseForm(2),
}


class FolderCheckpoint:
    """Dense and MLX-quantized models, and the MXFP4 experts of gpt-oss.

    `X.weight` of a quantized layer comes as `Affine`; `X_blocks` too, with the scales of
    `X_scales`. MXFP8 comes as bfloat16, which holds it exactly.
    """

    def __init__(self, folder: Path, shards: list[Path] | None = None) -> None:
        """Raises `CheckpointError` or `UnsupportedModel`. `shards`: only these files."""
        self.path = folder
        self._files: list[SafetensorsFile] = []
        self._where: dict[str, SafetensorsFile] = {}
        self.config: Mapping[str, Any] = read_json(folder / "config.json")
        self._quantization = read_quantization(folder / "config.json", self.config)
        self.format: Format = "safetensors" if self._quantization is None else "mlx"
        index: dict[str, str] = {}
        if shards is None:
            index = read_index(folder)
            shards = sorted({folder / file for file in index.values()}) or find_shards(folder)
        try:
            for path in shards:
                self._open(path)
            for name, file in index.items():
                if name not in self._where or self._where[name].path.name != file:
                    raise CheckpointError(
                        f"{folder / file}: has no tensor '{name}', which {INDEX} says it has"
                    )
        except BaseException:
            self.close()
            raise
        self._hidden = {part for layer in self._quantized_layers() for part in _sides(layer)}
        self._hidden |= {_scales_of(name) for name in self._where if self._is_blocks(name)}

    def _open(self, path: Path) -> None:
        file = SafetensorsFile(path)
        self._files.append(file)
        for name in file.tensors:
            if name in self._where:
                raise CheckpointError(
                    f"{path}: tensor '{name}' is also in {self._where[name].path.name}"
                )
            self._where[name] = file

    def files(self) -> tuple[Path, ...]:
        """The shards, and config.json: it says how packed weights are to be read."""
        return (self.path / "config.json", *(file.path for file in self._files))

    def names(self) -> Iterator[str]:
        return (name for name in self._where if name not in self._hidden)

    def __contains__(self, name: str) -> bool:
        return name in self._where and name not in self._hidden

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored(name)
        if self._is_blocks(name):
            return (*stored.shape[:-2], stored.shape[-2] * 32)
        packing = self._packing(name)
        if packing is None:
            return stored.shape
        return (*stored.shape[:-1], stored.shape[-1] * 32 // packing.bits)

    def kind(self, name: str) -> str:
        packing = self._packing(name)
        if self._is_blocks(name):
            return "mxfp4"
        if packing is None:
            return self._stored(name).dtype
        if packing.mode != "affine":
            return packing.mode
        return f"affine {packing.bits}-bit/{packing.group}"

    def nbytes(self, name: str) -> int:
        nbytes = self._stored(name).nbytes
        if self._is_blocks(name):
            return nbytes + self._where[_scales_of(name)].find(_scales_of(name)).nbytes
        if self._packing(name) is None:
            return nbytes
        sides = _sides(name.removesuffix(".weight"))
        return nbytes + sum(self._where[s].find(s).nbytes for s in sides if s in self._where)

    def form(self, name: str) -> Form:
        if self._is_blocks(name):
            return _FLOAT_FORMS["mxfp4"]
        packing = self._packing(name)
        if packing is None:
            return DenseForm(self._where[name].value_bytes(name))
        if packing.mode != "affine":
            return _FLOAT_FORMS[packing.mode]
        sides = []
        for side in _sides(name.removesuffix(".weight")):
            file = self._side(name, side)
            # bfloat16 becomes float32, as in `_group_values`.
            wide = file.find(side).dtype == "BF16"
            sides.append(GroupForm(4 if wide else file.value_bytes(side)))
        return AffineForm(packing.bits, packing.group, *sides)

    def tensor(self, name: str) -> Tensor:
        """Raises `CheckpointError` if missing, inconsistent or not finite, `UnsupportedModel`
        for a type that holds no weights."""
        packing = self._packing(name)
        file = self._where[name]
        tensor: Tensor
        if self._is_blocks(name) or (packing is not None and packing.mode != "affine"):
            tensor = self._small_floats(name, "mxfp4" if packing is None else packing.mode)
        else:
            tensor = file.dense(name) if packing is None else self._affine(name, packing)
        require_finite(file.path, name, tensor)
        return tensor

    def forget_vocabulary(self) -> None:
        """The vocabulary is in files of its own."""

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _stored(self, name: str) -> StoredTensor:
        if name not in self:
            raise missing_tensor(self.path, name, self.names())
        return self._where[name].find(name)

    def _quantized_layers(self) -> Iterator[str]:
        if self._quantization is None:
            return
        for name, file in self._where.items():
            if name.endswith(".weight") and file.find(name).dtype == "U32":
                yield name.removesuffix(".weight")

    def _packing(self, name: str) -> Packing | None:
        """How a quantized layer's weight is packed; None for what is not quantized."""
        stored = self._stored(name)
        if self._quantization is None or stored.dtype != "U32" or not name.endswith(".weight"):
            return None
        packing = self._quantization.packing(name.removesuffix(".weight"))
        where = f"{self._where[name].path}: tensor '{name}'"
        if packing is None:
            raise CheckpointError(f"{where} is packed, but config.json says it is not quantized")
        if (
            len(stored.shape) < 2
            or 0 in stored.shape
            or stored.shape[-1] * 32 % (packing.bits * packing.group)
        ):
            raise CheckpointError(
                f"{where} of shape {list(stored.shape)} does not hold whole groups of "
                f"{packing.group} codes of {packing.bits} bits"
            )
        return packing

    def _affine(self, name: str, packing: Packing) -> Affine:
        scales, biases = _sides(name.removesuffix(".weight"))
        shape = self.shape(name)
        groups = (*shape[:-1], shape[-1] // packing.group)
        return Affine(
            codes=self._where[name].words(name),
            bits=packing.bits,
            group=packing.group,
            scales=self._group_values(name, scales, groups),
            biases=self._group_values(name, biases, groups),
        )

    def _is_blocks(self, name: str) -> bool:
        """Whether it holds MXFP4 in blocks of 32, as gpt-oss publishes its experts."""
        if not name.endswith("_blocks") or _scales_of(name) not in self._where:
            return False
        stored = self._where[name].find(name)
        return stored.dtype == "U8" and len(stored.shape) > 2 and stored.shape[-1] == 16

    def _small_floats(self, name: str, mode: str) -> Tensor:
        blocks = self._is_blocks(name)
        side = _scales_of(name) if blocks else f"{name.removesuffix('.weight')}.scales"
        scales = self._side(name, side).octets(side)
        shape = self.shape(name)
        needed = (*shape[:-1], shape[-1] // (16 if mode == "nvfp4" else 32))
        if scales.shape != needed:
            raise CheckpointError(
                f"{self._where[side].path}: tensor '{side}' has shape {list(scales.shape)}; "
                f"'{name}' needs {list(needed)}"
            )
        file = self._where[name]
        if mode == "nvfp4":
            return microscaling.nvfp4(file.words(name), scales)
        if mode == "mxfp8":
            return microscaling.mxfp8(file.words(name), scales)
        raw = file.octets(name) if blocks else file.words(name).view(np.uint8)
        try:
            return microscaling.mxfp4(raw.reshape(*scales.shape, 16), scales)
        except OverflowError:
            raise UnsupportedModel(
                f"{file.path}: tensor '{name}' has scales beyond what float16 holds",
                hint="Get the model in another quantization.",
            ) from None

    def _side(self, weight: str, name: str) -> SafetensorsFile:
        """The file with a packed weight's scales or biases."""
        if name not in self._where:
            raise CheckpointError(
                f"{self._where[weight].path}: tensor '{weight}' is packed, "
                f"but its '{name}' is missing"
            )
        return self._where[name]

    def _group_values(self, weight: str, name: str, shape: tuple[int, ...]) -> GroupValues:
        values = self._side(weight, name).dense(name)
        if values.shape != shape:
            raise CheckpointError(
                f"{self._where[name].path}: tensor '{name}' has shape {list(values.shape)}; "
                f"'{weight}' needs {list(shape)}"
            )
        # bfloat16 has no numpy type; float32 holds every value of it exactly.
        return GroupValues(
            values.to_float32() if values.dtype == "bfloat16" else np.asarray(values.data)
        )


def _scales_of(blocks: str) -> str:
    return f"{blocks.removesuffix('_blocks')}_scales"


def _sides(layer: str) -> tuple[str, str]:
    return f"{layer}.scales", f"{layer}.biases"
