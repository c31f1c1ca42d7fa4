"""Buffers for a kernel, described on the command line.

NAME=[TYPE:]SHAPE[:FILL]    q=4x64   q=half:4x64:arange   out=1024
NAME=VALUE                  of a parameter that is a reference: n=64   scale=0.125
NAME=FILE.npy               the array in a file
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from localllm.errors import LocalLLMError
from localllm.kernels_metal.emulator.signature import Parameter, Signature

FILLS = ("random", "zeros", "ones", "arange", "unset")

_BFLOAT = ("bfloat", "bfloat16_t")
_TYPES: dict[str, type[np.generic]] = {
    "float": np.float32,
    "half": np.float16,
    "float16_t": np.float16,
    "bfloat": np.uint16,
    "bfloat16_t": np.uint16,
    "bool": np.bool_,
    "char": np.int8,
    "int8_t": np.int8,
    "uchar": np.uint8,
    "uint8_t": np.uint8,
    "short": np.int16,
    "int16_t": np.int16,
    "ushort": np.uint16,
    "uint16_t": np.uint16,
    "int": np.int32,
    "int32_t": np.int32,
    "uint": np.uint32,
    "uint32_t": np.uint32,
    "long": np.int64,
    "int64_t": np.int64,
    "ulong": np.uint64,
    "uint64_t": np.uint64,
    "size_t": np.uint64,
}
_VECTOR = re.compile(r"(?:packed_)?([a-z]+)([234])$")
_SHAPE = re.compile(r"\d+(?:x\d+)*$")


class BadBuffer(LocalLLMError):
    """A buffer is missing, unknown, or described in a way that makes no sense."""


def make_buffers(
    signature: Signature, specs: Sequence[str], template: Mapping[str, str], seed: int = 0
) -> list[np.ndarray]:
    """One array for each index up to the highest; those that nothing is bound to are one byte.

    Raises BadBuffer, which names the parameter.
    """
    given = _by_name(signature, specs)
    buffers = [np.zeros(1, np.uint8)] * (
        1 + max((p.index for p in signature.parameters), default=-1)
    )
    random = np.random.default_rng(seed)
    for parameter in signature.parameters:
        kind = template.get(parameter.kind) or signature.template.get(parameter.kind)
        buffers[parameter.index] = _make(parameter, kind or parameter.kind, given, random)
    return buffers


def _by_name(signature: Signature, specs: Sequence[str]) -> dict[str, str]:
    names = [parameter.name for parameter in signature.parameters]
    given: dict[str, str] = {}
    for spec in specs:
        name, equals, value = spec.partition("=")
        if not equals or not value:
            raise BadBuffer(f"--buffer {spec}: not NAME=SOMETHING", hint=_hint())
        if name not in names:
            raise BadBuffer(
                f"{signature.name} has no buffer {name!r}", hint="it has: " + ", ".join(names)
            )
        given[name] = value
    missing = [name for name in names if name not in given]
    if missing:
        raise BadBuffer(
            f"{signature.name} needs a --buffer for: {', '.join(missing)}", hint=_hint()
        )
    return given


def _make(
    parameter: Parameter, kind: str, given: Mapping[str, str], random: np.random.Generator
) -> np.ndarray:
    spec = given[parameter.name]
    if spec.endswith(".npy"):
        return _loaded(parameter, kind, Path(spec))
    parts = spec.split(":")
    named = len(parts) > 1 and (parts[0] in _TYPES or _VECTOR.match(parts[0]) is not None)
    if named:
        kind = parts.pop(0)
    dtype, lanes = _element(parameter, kind)
    if not (parameter.pointer or named):
        return _value(parameter, kind, dtype, spec)
    if not parts or not _SHAPE.match(parts[0]) or len(parts) > 2:
        raise BadBuffer(f"{parameter.name}={spec}: not a shape such as 4x64", hint=_hint())
    shape = tuple(int(size) for size in parts[0].split("x"))
    fill = parts[1] if len(parts) == 2 else "unset" if parameter.writable else "random"
    if lanes > 1:
        shape = (*shape, lanes)
    return _filled(parameter, kind, dtype, shape, fill, random)


def _element(parameter: Parameter, kind: str) -> tuple[type[np.generic], int]:
    if kind in _TYPES:
        return _TYPES[kind], 1
    vector = _VECTOR.match(kind)
    if vector and vector[1] in _TYPES:
        packed = kind.startswith("packed_")
        lanes = int(vector[2])
        return _TYPES[vector[1]], 4 if lanes == 3 and not packed else lanes
    raise BadBuffer(
        f"{parameter.name} has elements of type {kind}, which is not a plain type",
        hint=f"give its bytes: {parameter.name}=uchar:SIZE or a .npy file of uint8",
    )


def _value(parameter: Parameter, kind: str, dtype: type[np.generic], text: str) -> np.ndarray:
    try:
        number = {"true": 1.0, "false": 0.0}.get(text)
        exact = int(text, 0) if number is None and re.match(r"-?(0x)?[0-9a-fA-F]+$", text) else None
        value = exact if exact is not None else float(text) if number is None else number
        if kind in _BFLOAT:
            return as_bfloat(np.array([value], np.float32))
        made = np.array([value]).astype(dtype)
        if np.issubdtype(dtype, np.integer) and made[0] != value:
            raise ValueError
        return made
    except (ValueError, OverflowError) as error:
        raise BadBuffer(f"{parameter.name}={text}: not a value of {kind}") from error


def _filled(
    parameter: Parameter,
    kind: str,
    dtype: type[np.generic],
    shape: tuple[int, ...],
    fill: str,
    random: np.random.Generator,
) -> np.ndarray:
    size = int(np.prod(shape))
    if fill == "unset":  # all ones: NaN in every float type, so what is never written shows
        raw = np.full(size * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        return raw.view(dtype).reshape(shape)
    if fill not in FILLS:
        raise BadBuffer(
            f"{parameter.name}: no filling is called {fill!r}",
            hint="there are: " + ", ".join(FILLS),
        )
    floats = kind in _BFLOAT or np.issubdtype(dtype, np.floating)
    values: np.ndarray
    if fill == "zeros":
        values = np.zeros(size)
    elif fill == "ones":
        values = np.ones(size)
    elif fill == "arange":
        values = np.arange(size)
    elif floats:
        values = random.standard_normal(size)
    else:
        kinds = np.dtype(dtype)
        top = 1 if kinds == np.bool_ else int(np.iinfo(kinds).max)
        values = random.integers(0, top, size, np.uint64, endpoint=True)
    if kind in _BFLOAT:
        return as_bfloat(values.astype(np.float32)).reshape(shape)
    return values.astype(dtype).reshape(shape)


def _loaded(parameter: Parameter, kind: str, path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadBuffer(f"{parameter.name}={path}: {error}") from error
    if kind in _TYPES or _VECTOR.match(kind):
        wanted = np.dtype(_element(parameter, kind)[0])
        if array.dtype != wanted:
            raise BadBuffer(
                f"{path} holds {array.dtype}, but {parameter.name} is of {kind}",
                hint=f"save it as {wanted}"
                + (" (the bits of bfloat16)" if kind in _BFLOAT else ""),
            )
    return array


def as_bfloat(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16)


def readable(array: np.ndarray, kind: str) -> np.ndarray:
    """The values: bfloat16 bits become float32."""
    if kind not in _BFLOAT:
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def _hint() -> str:
    return "for example q=4x64, q=half:4x64:zeros, n=64, w=weights.npy; fills: " + ", ".join(FILLS)
