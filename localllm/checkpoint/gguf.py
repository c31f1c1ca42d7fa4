"""GGUF files, whole or split in parts, as a `Checkpoint`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from localllm.checkpoint.base import Format
from localllm.checkpoint.finite import require_finite
from localllm.checkpoint.form import DenseForm, Form, form_of
from localllm.checkpoint.gguf_blocks import FORMATS, to_affine
from localllm.checkpoint.gguf_header import Header, Metadata, TensorInfo, read_header
from localllm.checkpoint.tensor import Dense, DType, Tensor
from localllm.checkpoint.weight_file import WeightFile, missing_tensor
from localllm.errors import CheckpointError, UnsupportedModel

_DENSE: dict[str, tuple[np.dtype, DType]] = {
    "F32": (np.dtype("<f4"), "float32"),
    "F16": (np.dtype("<f2"), "float16"),
    "BF16": (np.dtype("<u2"), "bfloat16"),
}
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_PARTS = 1000


class GGUFCheckpoint:
    """Reads any part of a split model together with the others beside it."""

    format: Format = "gguf"

    def __init__(self, path: Path) -> None:
        """Raises `CheckpointError` for a damaged or incomplete file."""
        self.path = path
        self._files: list[WeightFile] = []
        self._tensors: dict[str, tuple[WeightFile, TensorInfo]] = {}
        try:
            headers = [self._open(part) for part in part_paths(path)]
        except BaseException:
            self.close()
            raise
        self.config: Mapping[str, Any] = headers[0].metadata
        self.kinds = headers[0].metadata.kinds

    def _open(self, path: Path) -> Header:
        file = WeightFile(path)
        self._files.append(file)
        header = read_header(file)
        for name, info in header.tensors.items():
            if name in self._tensors:
                other = self._tensors[name][0].path
                raise CheckpointError(f"{path}: tensor '{name}' is already in {other.name}")
            self._tensors[name] = (file, info)
        _check_part(path, header.metadata)
        return header

    def files(self) -> tuple[Path, ...]:
        return tuple(file.path for file in self._files)

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def kind(self, name: str) -> str:
        return self._find(name)[1].type.name

    def nbytes(self, name: str) -> int:
        return self._find(name)[1].nbytes

    def form(self, name: str) -> Form:
        file, info = self._find(name)
        kind = info.type
        if kind.name in _DENSE:
            return DenseForm(_DENSE[kind.name][0].itemsize)
        if kind.name not in FORMATS:
            raise _unread(file, name, kind.name)
        if len(info.shape) == 1:
            return DenseForm(4)
        return form_of(to_affine(kind, (1, kind.block), lambda at, size: bytes(size)))

    def tensor(self, name: str) -> Tensor:
        """F32, F16 and BF16 as views into the file, blocks as `Affine` without loss.

        A quantized vector (no model is known to have one) comes as its exact float32 values, since
        `Affine` is for matrices.
        Raises `CheckpointError` if missing or not finite, `UnsupportedModel` for a type that is
        not read.
        """
        file, info = self._find(name)
        kind = info.type
        tensor: Tensor
        if kind.name in _DENSE:
            stored, dtype = _DENSE[kind.name]
            tensor = Dense(file.array(info.offset, stored, info.shape), dtype)
        elif kind.name in FORMATS:
            tensor = to_affine(kind, info.shape, lambda at, size: file.read(info.offset + at, size))
        else:
            raise _unread(file, name, kind.name)
        require_finite(file.path, name, tensor)
        if isinstance(tensor, Dense) or len(info.shape) > 1:
            return tensor
        return Dense(tensor.to_float32(), "float32")

    def raw(self, name: str) -> np.ndarray:
        """uint8 [nbytes]: a tensor as it lies in the file."""
        file, info = self._find(name)
        return np.frombuffer(file.read(info.offset, info.nbytes), np.uint8)

    def forget_vocabulary(self) -> None:
        self.config = {
            key: value
            for key, value in self.config.items()
            if not (key.startswith("tokenizer.") and isinstance(value, list))
        }

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _find(self, name: str) -> tuple[WeightFile, TensorInfo]:
        if name not in self._tensors:
            raise missing_tensor(self.path, name, self._tensors)
        return self._tensors[name]


def _unread(file: WeightFile, name: str, kind: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{file.path}: tensor '{name}' is stored as {kind}, which is not read; "
        f"supported are {', '.join([*_DENSE, *FORMATS])}",
        hint="Get the model in one of those, for example Q4_K_M or Q8_0.",
    )


def part_paths(path: Path) -> list[Path]:
    """All parts of the split model that `path` belongs to, or `path` alone.

    Raises `CheckpointError` naming the parts that are not there.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= _MAX_PARTS:
        raise CheckpointError(f"{path}: is not a possible part of a split model")
    parts = [
        path.with_name(f"{match['stem']}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.exists()]
    if path.exists() and missing:
        raise CheckpointError(
            f"{path}: is one of {count} parts; missing beside it: {', '.join(missing)}",
            hint="Download all parts into the same folder.",
        )
    return parts


def _check_part(path: Path, metadata: Metadata) -> None:
    """The name and the metadata must tell the same story about which part this is."""
    match = _PART.fullmatch(path.name)
    number, count = (int(match["number"]), int(match["count"])) if match else (1, 1)
    stored = metadata.get("split.count", count), metadata.get("split.no", number - 1)
    if stored[0] in (0, 1) and match is None:
        return
    if stored != (count, number - 1):
        raise CheckpointError(
            f"{path}: says it is part {stored[1]} (from 0) of {stored[0]}, against its name",
            hint="Keep the names the parts were published with: …-00001-of-00003.gguf.",
        )
