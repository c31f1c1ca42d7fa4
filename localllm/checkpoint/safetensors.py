"""Safetensors files: a checked header, views into the map, and an atomic writer.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from localllm.checkpoint.atomic import write_parts
from localllm.checkpoint.tensor import Dense, DType
from localllm.checkpoint.weight_file import WeightFile, missing_tensor
from localllm.errors import CheckpointError, UnsupportedModel

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMS = 8
_MAX_DIM = 1 << 40

# Bits of one element of every type the format knows.
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_WEIGHTS: dict[str, tuple[np.dtype, DType]] = {
    "F32": (np.dtype("<f4"), "float32"),
    "F16": (np.dtype("<f2"), "float16"),
    "BF16": (np.dtype("<u2"), "bfloat16"),
}
_WRITTEN = {
    "float32": "F32", "float16": "F16", "float64": "F64", "bool": "BOOL",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """One file. Raises `CheckpointError` if its header and its bytes do not agree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = WeightFile(path)
        try:
            self.tensors = _read_header(self._file)
        except BaseException:
            self._file.close()
            raise

    def find(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise missing_tensor(self.path, name, self.tensors)
        return self.tensors[name]

    def dense(self, name: str) -> Dense:
        """A view into the file where it is aligned. Raises `UnsupportedModel` for other types."""
        stored = self.find(name)
        layout, dtype = self._weight_type(stored)
        return Dense(self._file.array(stored.offset, layout, stored.shape), dtype)

    def value_bytes(self, name: str) -> int:
        """Of one of the values that `dense` gives; raises what `dense` raises."""
        return self._weight_type(self.find(name))[0].itemsize

    def _weight_type(self, stored: StoredTensor) -> tuple[np.dtype, DType]:
        if stored.dtype not in _WEIGHTS:
            raise UnsupportedModel(
                f"{self.path}: tensor '{stored.name}' is {stored.dtype}; weights can be "
                f"{', '.join(_WEIGHTS)}, or U32 where config.json describes MLX's quantization",
                hint="Convert the model to BF16, or get it in another format.",
            )
        return _WEIGHTS[stored.dtype]

    def words(self, name: str) -> np.ndarray:
        """The uint32 words of packed codes."""
        return self._integers(name, "U32", "<u4")

    def octets(self, name: str) -> np.ndarray:
        """uint8, as blocks and scales of small floats are stored."""
        return self._integers(name, "U8", "<u1")

    def _integers(self, name: str, kind: str, layout: str) -> np.ndarray:
        stored = self.find(name)
        if stored.dtype != kind:
            raise CheckpointError(f"{self.path}: tensor '{name}' is {stored.dtype}, not {kind}")
        return self._file.array(stored.offset, np.dtype(layout), stored.shape)

    def close(self) -> None:
        self._file.close()


def _read_header(file: WeightFile) -> dict[str, StoredTensor]:
    if file.size < 8:
        raise CheckpointError(f"{file.path}: {file.size} bytes are too few for a safetensors file")
    size = int.from_bytes(file.read(0, 8), "little")
    if size > _MAX_HEADER_BYTES or size > file.size - 8:
        raise CheckpointError(
            f"{file.path}: claims a header of {size} bytes in a file of {file.size}",
            hint="The file is cut short, or is no safetensors file; download it again.",
        )
    header = _parse(file.path, file.read(8, size))
    tensors = {
        name: _stored(file, name, entry, 8 + size)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_places(file, 8 + size, tensors)
    return tensors


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{path}: the header lists {twice!r} twice")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    return header


def _stored(file: WeightFile, name: str, entry: Any, start: int) -> StoredTensor:
    if not name.isprintable():  # it will be shown in a terminal
        raise CheckpointError(f"{file.path}: a tensor has the unprintable name {name!r}")
    where = f"{file.path}: tensor '{name}'"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} has no description in the header")
    dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where} has unknown type {dtype!r}")
    if not _naturals(shape) or len(shape) > _MAX_DIMS or max(shape, default=0) > _MAX_DIM:
        raise CheckpointError(f"{where} has an impossible shape: {_shown(shape)}")
    if not _naturals(place) or len(place) != 2 or place[0] > place[1]:
        raise CheckpointError(f"{where} has impossible data offsets: {_shown(place)}")
    begin, end = place
    if start + end > file.size:
        raise CheckpointError(
            f"{where} ends at byte {start + end}, but the file has only {file.size}",
            hint="The file is cut short; download it again.",
        )
    bits = math.prod(shape) * _BITS[dtype]
    if bits != (end - begin) * 8:
        raise CheckpointError(
            f"{where} has {end - begin} bytes; {dtype} of shape {_shown(shape)} needs {bits / 8:g}"
        )
    if 0 in shape and math.prod(d for d in shape if d) > _MAX_DIM:
        raise CheckpointError(f"{where} has an impossible shape: {_shown(shape)}")
    return StoredTensor(name, dtype, tuple(shape), start + begin, end - begin)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_places(file: WeightFile, start: int, tensors: dict[str, StoredTensor]) -> None:
    """The data must be covered from start to end, each byte once."""
    position, before = start, "the header"
    for stored in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if stored.offset < position:
            raise CheckpointError(f"{file.path}: tensors {before} and '{stored.name}' overlap")
        if stored.offset > position:
            raise CheckpointError(
                f"{file.path}: {stored.offset - position} bytes before tensor '{stored.name}' "
                "belong to no tensor"
            )
        position, before = stored.offset + stored.nbytes, f"'{stored.name}'"
    if position != file.size:
        raise CheckpointError(
            f"{file.path}: {file.size - position} bytes at the end belong to no tensor",
            hint="The file is not what its header says; download it again.",
        )


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Dense | np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes all or nothing: `path` holds the old file until the new one is on the disk.

    Arrays keep their dtype; bfloat16 comes as `Dense`. Raises `CheckpointError` when an array's
    dtype is none the format knows, or the file cannot be written.
    """
    stored = {name: _to_write(path, name, tensor) for name, tensor in tensors.items()}
    # Wide elements first keeps everything aligned, as the format's own writer does.
    order = sorted(stored, key=lambda name: (-stored[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, array = stored[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    size = len(text).to_bytes(8, "little")
    write_parts(path, chain([size, text], _little_endian(stored[name][1] for name in order)))


def _to_write(path: Path, name: str, tensor: Dense | np.ndarray) -> tuple[str, np.ndarray]:
    array = tensor.data if isinstance(tensor, Dense) else tensor
    if isinstance(tensor, Dense) and tensor.dtype == "bfloat16":
        return "BF16", array
    if array.dtype.name not in _WRITTEN:
        raise CheckpointError(f"{path}: tensor '{name}' has type {array.dtype}, unknown here")
    return _WRITTEN[array.dtype.name], array


def _little_endian(arrays: Iterable[np.ndarray]) -> Iterator[memoryview]:
    for array in arrays:
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        yield np.ascontiguousarray(little).reshape(-1).view(np.uint8).data
