"""The header of a GGUF file: metadata and the table of tensors. Nothing in it is trusted.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from localllm.checkpoint.gguf_cursor import Cursor, StoredArray
from localllm.checkpoint.gguf_types import TYPES, WITHDRAWN, GGMLType
from localllm.checkpoint.weight_file import WeightFile
from localllm.errors import CheckpointError

# Far beyond any real model; what lies above is damage or malice.
_MAX_HEADER_BYTES = 512 << 20
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_NAME_BYTES = 1 << 16
_MAX_ALIGNMENT = 1 << 20
_MAX_DIMS = 4
_MIN_KEY_BYTES = 8 + 4 + 1  # key length, type, the smallest value
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # name length, number of dims, type, offset


class Metadata(Mapping[str, Any]):
    """Keys as in the file. An array is decoded to a list when it is first asked for.

    kinds: of each value the number of its type, and that of its elements if it is an array.
    """

    def __init__(self, values: dict[str, Any], kinds: dict[str, tuple[int, int | None]]) -> None:
        self._values = values
        self.kinds = kinds

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, StoredArray):
            value = self._values[key] = value.decode()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. `shape` is row-major; `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    metadata: Metadata
    tensors: dict[str, TensorInfo]


def read_header(file: WeightFile) -> Header:
    """Raises `CheckpointError` for anything that is not a sound GGUF v2 or v3 header."""
    cursor = Cursor(file.path, file.map, min(file.size, _MAX_HEADER_BYTES), file.size)
    _check_version(cursor)
    tensor_count = cursor.count("tensors", _MIN_TENSOR_BYTES, _MAX_TENSORS)
    key_count = cursor.count("metadata keys", _MIN_KEY_BYTES, _MAX_KEYS)
    metadata = _read_metadata(cursor, key_count)
    alignment = _alignment(cursor, metadata)
    tensors: dict[str, TensorInfo] = {}
    for index in range(tensor_count):
        info = _read_tensor_info(cursor, index, alignment)
        if info.name in tensors:
            raise cursor.error(f"tensor '{info.name}' is listed twice")
        tensors[info.name] = info
    start = -(-cursor.position // alignment) * alignment
    placed = {
        name: TensorInfo(name, info.shape, info.type, start + info.offset, info.nbytes)
        for name, info in tensors.items()
    }
    _check_places(file, placed)
    return Header(metadata, placed)


def _check_version(cursor: Cursor) -> None:
    magic = cursor.take(4, "the magic number")
    if magic != b"GGUF":
        raise cursor.error(
            f"is not a GGUF file: it starts with {magic!r}",
            hint="Download it again, or check that the file is what its name says.",
        )
    version = cursor.integer("<I", "the version")
    if version & 0xFFFF == 0 and version:
        raise cursor.error(
            "is a big-endian GGUF file; only little-endian ones are read",
            hint="Convert it with gguf_convert_endian.py, or get the little-endian file.",
        )
    if version not in (2, 3):
        raise cursor.error(
            f"is GGUF version {version}; versions 2 and 3 are read",
            hint="Convert the model again with a current llama.cpp." if version == 1 else None,
        )


def _read_metadata(cursor: Cursor, count: int) -> Metadata:
    values: dict[str, Any] = {}
    kinds: dict[str, tuple[int, int | None]] = {}
    for index in range(count):
        key = cursor.name(f"metadata key {index}", _MAX_NAME_BYTES)
        if key in values:
            raise cursor.error(f"metadata key '{key}' is listed twice")
        kinds[key] = cursor.kinds(f"metadata key '{key}'")
        values[key] = cursor.value(f"metadata key '{key}'")
    return Metadata(values, kinds)


def _alignment(cursor: Cursor, metadata: Metadata) -> int:
    alignment = metadata.get("general.alignment", 32)
    if (
        type(alignment) is not int
        or not 0 < alignment <= _MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise cursor.error(
            f"general.alignment is {alignment!r}, not a power of two up to {_MAX_ALIGNMENT}"
        )
    return alignment


def _read_tensor_info(cursor: Cursor, index: int, alignment: int) -> TensorInfo:
    name = cursor.name(f"the name of tensor {index}", _MAX_NAME_BYTES)
    where = f"tensor '{name}'"
    dims = cursor.integer("<I", f"{where}: the number of dimensions")
    if dims > _MAX_DIMS:
        raise cursor.error(f"{where} has {dims} dimensions; at most {_MAX_DIMS} are possible")
    # The file lists the fastest dimension first.
    shape = tuple(cursor.integer("<Q", f"{where}: its shape") for _ in range(dims))[::-1]
    if 0 in shape:
        raise cursor.error(f"{where} is empty: its shape is {list(shape)}")
    kind = _type(cursor, where, cursor.integer("<I", f"{where}: its type"))
    offset = cursor.integer("<Q", f"{where}: its offset")
    width = shape[-1] if shape else 1
    if width % kind.block:
        raise cursor.error(
            f"{where} has rows of {width} weights; {kind.name} comes in blocks of {kind.block}"
        )
    if offset % alignment:
        raise cursor.error(f"{where} starts at {offset}, not a multiple of {alignment}")
    return TensorInfo(name, shape, kind, offset, math.prod(shape) // kind.block * kind.nbytes)


def _type(cursor: Cursor, where: str, number: int) -> GGMLType:
    kind = TYPES.get(number)
    if kind is None:
        known = WITHDRAWN.get(number)
        what = f"type {known}, withdrawn from GGUF" if known else f"unknown type number {number}"
        raise cursor.error(
            f"{where} has {what}",
            hint="The file is damaged, or was made by a converter older or newer than this reader.",
        )
    return kind


def _check_places(file: WeightFile, tensors: dict[str, TensorInfo]) -> None:
    for info in tensors.values():
        if info.offset + info.nbytes > file.size:
            raise CheckpointError(
                f"{file.path}: tensor '{info.name}' ends at byte {info.offset + info.nbytes}, "
                f"but the file has only {file.size}",
                hint="The file is cut short or its header is damaged; download it again.",
            )
    stored = sorted((t for t in tensors.values() if t.nbytes), key=lambda t: t.offset)
    for one, next_ in pairwise(stored):
        if one.offset + one.nbytes > next_.offset:
            raise CheckpointError(f"{file.path}: tensors '{one.name}' and '{next_.name}' overlap")
