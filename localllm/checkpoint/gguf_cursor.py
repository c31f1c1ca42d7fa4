"""A bounded walk through the bytes of a GGUF header. Every read is checked against the end."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localllm.errors import CheckpointError

_MAX_STRING_BYTES = 64 << 20
_MAX_ARRAY = 1 << 24  # elements; the largest vocabularies have some 300,000
_MAX_DEPTH = 4  # arrays in arrays

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i",
    6: "<f", _BOOL: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_LENGTH = struct.Struct("<Q")
_ARRAY_HEAD = struct.Struct("<IQ")


class Cursor:
    """Reads little-endian values from `position` on; nothing at or after `end` is touched."""

    def __init__(self, path: Path, data: mmap.mmap | bytes, end: int, file_size: int) -> None:
        self.path = path
        self.data = data
        self.end = end
        self.file_size = file_size
        self.position = 0

    def error(self, message: str, hint: str | None = None) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}", hint=hint)

    def _too_long(self, what: str) -> CheckpointError:
        if self.end < self.file_size:
            return self.error(f"{what}: the header is larger than {self.end} bytes")
        return self.error(
            f"{what} reaches beyond the end of the file",
            hint="The file is cut short or damaged; download it again.",
        )

    def take(self, size: int, what: str) -> bytes:
        start = self.position
        if size > self.end - start:
            raise self._too_long(what)
        self.position = start + size
        return self.data[start : self.position]

    def integer(self, form: str, what: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form), what))
        return int(value)

    def count(self, what: str, smallest: int, limit: int) -> int:
        """A number of things to come, each of at least `smallest` bytes."""
        number = self.integer("<Q", f"the number of {what}")
        if number > limit or number * smallest > self.end - self.position:
            raise self.error(
                f"claims {number} {what}, more than "
                + (f"the {limit} that are possible" if number > limit else "the file can hold"),
                hint="The file is cut short or damaged; download it again.",
            )
        return number

    def string(self, what: str, limit: int = _MAX_STRING_BYTES) -> str:
        size = self.integer("<Q", f"{what}: its length")
        if size > limit and size <= self.end - self.position:
            raise self.error(f"{what} is {size} bytes long; {limit} are possible")
        try:
            return self.take(size, what).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not valid UTF-8") from error

    def name(self, what: str, limit: int) -> str:
        """A string fit to be shown in a terminal."""
        name = self.string(what, limit)
        if not name.isprintable():
            raise self.error(f"{what} is unprintable: {name!r}")
        return name

    def kinds(self, what: str) -> tuple[int, int | None]:
        """The type of the value that stands here, and of its elements if it is an array."""
        start = self.position
        kind = self.integer("<I", f"{what}: its type")
        inner = self.integer("<I", f"{what}: its type") if kind == _ARRAY else None
        self.position = start
        return kind, inner

    def value(self, what: str) -> Any:
        """A typed value; arrays come as `StoredArray`, checked but not decoded."""
        kind = self.integer("<I", f"{what}: its type")
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            start = self.position
            self._skip_array(what, 1)
            return StoredArray(self.path, what, self.data[start : self.position])
        if kind in _SCALARS:
            form = _SCALARS[kind]
            return struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        raise self.error(f"{what} has unknown value type {kind}")

    def _skip_array(self, what: str, depth: int) -> None:
        kind, count = _ARRAY_HEAD.unpack(self.take(_ARRAY_HEAD.size, what))
        smallest = _smallest(kind)
        if smallest is None:
            raise self.error(f"{what} is an array of unknown type {kind}")
        if count > _MAX_ARRAY:
            raise self.error(f"{what} claims {count} elements; {_MAX_ARRAY} are possible")
        if count * smallest > self.end - self.position:
            raise self._too_long(what)
        if kind == _STRING:
            self._skip_strings(what, count)
        elif kind == _ARRAY:
            if depth == _MAX_DEPTH:
                raise self.error(f"{what} nests arrays more than {_MAX_DEPTH} deep")
            for _ in range(count):
                self._skip_array(what, depth + 1)
        else:
            self.position += count * smallest

    def _skip_strings(self, what: str, count: int) -> None:
        # Vocabularies of 262,144 strings pass here whenever a file is opened: keep it tight.
        length_at, data, position = _LENGTH.unpack_from, self.data, self.position
        last = self.end - _LENGTH.size
        for _ in range(count):
            if position > last:
                raise self._too_long(what)
            position += 8 + length_at(data, position)[0]
        if position > self.end:
            raise self._too_long(what)
        self.position = position


@dataclass(frozen=True)
class StoredArray:
    """The bytes of an array whose lengths were checked: element type, count, elements."""

    path: Path
    what: str
    data: bytes

    def decode(self) -> list[Any]:
        """Raises `CheckpointError` for a string that is not UTF-8."""
        return self._decode(0)[0]

    def _decode(self, position: int) -> tuple[list[Any], int]:
        kind, count = _ARRAY_HEAD.unpack_from(self.data, position)
        position += _ARRAY_HEAD.size
        if kind == _STRING:
            return self._decode_strings(position, count)
        if kind == _ARRAY:
            arrays = []
            for _ in range(count):
                array, position = self._decode(position)
                arrays.append(array)
            return arrays, position
        dtype = np.dtype(_SCALARS[kind]) if kind != _BOOL else np.dtype(np.uint8)
        values = np.frombuffer(self.data, dtype, count, position)
        if kind == _BOOL:
            values = values != 0
        return values.tolist(), position + count * dtype.itemsize

    def _decode_strings(self, position: int, count: int) -> tuple[list[Any], int]:
        length_at, data = _LENGTH.unpack_from, self.data
        strings: list[Any] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + length_at(data, position)[0]
                strings.append(data[start:position].decode())
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: {self.what}: element {len(strings)} is not valid UTF-8"
            ) from error
        return strings, position


def _smallest(kind: int) -> int | None:
    """Bytes the smallest element of a type takes, or None for an unknown type."""
    if kind == _STRING:
        return _LENGTH.size
    if kind == _ARRAY:
        return _ARRAY_HEAD.size
    form = _SCALARS.get(kind)
    return None if form is None else struct.calcsize(form)
