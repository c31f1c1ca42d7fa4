"""The Metal sources that ship inside the installed MLX wheel, made ready for clang."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from localllm.errors import LocalLLMError

_PREFIX = "mlx/backend/metal/kernels/"
_INCLUDE = re.compile(rf'^[ \t]*#include "({_PREFIX}[\w/]+\.h)"[^\n]*\n', re.MULTILINE)

# What every program has anyway, through MLX's utils.h in front of it.
_ALREADY_THERE = ("utils.h", "bf16.h", "bf16_math.h", "complex.h", "defines.h", "logging.h")


@dataclass(frozen=True)
class Edit:
    """A change of text that clang needs and that leaves the meaning as it is."""

    file: str
    old: str
    new: str
    reason: str


_CONSTRUCTOR = "clang cannot default-construct a member whose constructor is `thread`-qualified"
_INTEGRAL = "clang adds no integral_constant to a pointer that has an address space"
EDITS = (
    Edit(
        "quantized.h",
        "\n    constant int& ",
        "\n    const constant int& ",
        "Metal takes what lives in `constant` as const; clang wants it said",
    ),
    Edit(
        "steel/attn/kernels/steel_attention.h",
        "conditional_t<is_bool, bool, selem_t>",
        "conditional_t<is_bool, uchar, selem_t>",
        "clang has no vectors of bool; what is loaded from a mask is 0 or 1 either way",
    ),
    Edit("steel/gemm/mma.h", "MMATile() thread {}", "MMATile() {}", _CONSTRUCTOR),
    Edit("steel/attn/mma.h", "MMATile() thread {}", "MMATile() {}", _CONSTRUCTOR),
    Edit("steel/attn/mma.h", "src += str_x;", "src += (long)str_x;", _INTEGRAL),
    Edit("steel/attn/mma.h", "src += str_y;", "src += (long)str_y;", _INTEGRAL),
    Edit(
        "steel/attn/mma.h",
        "src -= kElemCols * str_y;",
        "src -= kElemCols * (long)str_y;",
        _INTEGRAL,
    ),
    Edit(
        "steel/utils/integral_constant.h",
        "operator value_type() const thread noexcept",
        "operator value_type() const noexcept",
        "clang calls no `thread`-qualified conversion on a temporary",
    ),
)


class ShippedSourceMissing(LocalLLMError):
    """This MLX ships no such source, or not in the form that is known here."""


def folder() -> Path:
    """Where the wheel keeps its kernels."""
    return Path(mx.__file__).parent / "include" / _PREFIX


@cache
def shipped_source(file: str, *before: str) -> str:
    """The text of `before` and `file` with all that they include, each once, edited for clang.

    Raises ShippedSourceMissing, which names the version of MLX.
    """
    seen: set[str] = set(_ALREADY_THERE)
    text = "".join(_expanded(name, seen) for name in (*before, file))
    return text.encode("ascii", "replace").decode()  # comments name their authors


@cache
def preamble() -> str:
    """What MLX puts before every kernel that it compiles at run time: utils.h and what it includes,
    as installed."""
    return _expanded("utils.h", set())


def unused_edits(files: set[str] | None = None) -> list[Edit]:
    """Edits whose text this MLX no longer has; where a compile fails, they may be why."""
    return [
        edit
        for edit in EDITS
        if (files is None or edit.file in files) and edit.old not in _read(edit.file)
    ]


def mlx_version() -> str:
    return version("mlx")


def _expanded(file: str, seen: set[str]) -> str:
    if file in seen:
        return ""
    seen.add(file)
    text = _read(file).replace("#pragma once", "")
    for edit in EDITS:
        if edit.file == file:
            text = text.replace(edit.old, edit.new)

    def included(match: re.Match[str]) -> str:
        return _expanded(match[1].removeprefix(_PREFIX), seen)

    return _INCLUDE.sub(included, text)


def _read(file: str) -> str:
    path = folder() / file
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ShippedSourceMissing(
            f"MLX {mlx_version()} ships no {file}: {error.strerror}",
            hint="the comparison with MLX's kernels knows MLX 0.32 and 0.33",
        ) from error
