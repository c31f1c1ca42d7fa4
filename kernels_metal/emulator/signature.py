"""What a Metal kernel asks for: its parameters, read from the source text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from localllm.errors import LocalLLMError

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_KERNEL = re.compile(
    r"(?:template\s*<(?P<template>[^{};]*?)>\s*)?"
    r"(?:\[\[\s*kernel\b[^\]]*\]\]|\bkernel\b)\s+void\s+(?P<name>\w+)\s*\(",
    re.DOTALL,
)
_CONSTANT = re.compile(r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\(")


class NoSuchKernelHere(LocalLLMError):
    """A source has no kernel, or none or several that could be meant."""


@dataclass(frozen=True)
class Parameter:
    """A buffer parameter. kind: the type of an element. index: of its [[buffer(i)]]."""

    name: str
    kind: str
    space: str
    writable: bool
    pointer: bool
    index: int


@dataclass(frozen=True)
class Signature:
    """template: the names of its template parameters, with their defaults or None. constants: the
    names of all function constants of the file."""

    name: str
    parameters: tuple[Parameter, ...]
    template: Mapping[str, str | None]
    constants: tuple[str, ...]


def kernel_names(source: str) -> list[str]:
    return [match["name"] for match in _KERNEL.finditer(_bare(source))]


def read_signature(source: str, name: str | None = None) -> Signature:
    """Of kernel `name`, or of the only one. Raises NoSuchKernelHere, which lists what there is."""
    bare = _bare(source)
    found = list(_KERNEL.finditer(bare))
    names = [match["name"] for match in found]
    if not found:
        raise NoSuchKernelHere(
            "no kernel found", hint="a kernel begins with `kernel void` or `[[kernel]] void`"
        )
    if name is None and len(found) > 1:
        raise NoSuchKernelHere(
            f"{len(found)} kernels: {', '.join(names)}", hint="choose one with --kernel NAME"
        )
    chosen = [match for match in found if name in (None, match["name"])]
    if not chosen:
        raise NoSuchKernelHere(f"no kernel is called {name}", hint="there are: " + ", ".join(names))
    match = chosen[0]
    end = _closing(bare, match.end())
    parameters: list[Parameter] = []
    for text in _split(bare[match.end() : end]):
        parameter = _parameter(text, len(parameters))
        if parameter is not None:
            parameters.append(parameter)
    constants = tuple(found[2] for found in _CONSTANT.finditer(bare))
    return Signature(match["name"], tuple(parameters), _template(match["template"]), constants)


def _bare(source: str) -> str:
    """Without comments, lines kept."""
    return _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), source)


def _closing(text: str, start: int) -> int:
    depth = 1
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise NoSuchKernelHere("a kernel's parameters do not end: a parenthesis is missing")


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, current = [], 0, ""
    for letter in text + ",":
        depth += {"(": 1, "[": 1, "<": 1, ")": -1, "]": -1, ">": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [part for part in parts if part]


def _parameter(text: str, position: int) -> Parameter | None:
    """None for what the GPU supplies, such as [[thread_position_in_grid]]."""
    declaration = " ".join(re.sub(r"\[\[.*?\]\]", "", text, flags=re.DOTALL).split())
    place = re.search(r"\[\[\s*buffer\(\s*(\d+)\s*\)", text)
    pointer = re.match(r"(.*?)([*&])\s*(\w+)$", declaration)
    if pointer is None:
        return None
    words = pointer[1].split()
    if "threadgroup" in words:
        raise NoSuchKernelHere(
            f"{pointer[3]} is threadgroup memory whose size the caller sets",
            hint="declare it inside the kernel; the emulator binds device and constant buffers",
        )
    space = next((word for word in words if word in ("device", "constant")), "?")
    dropped = {"const", "volatile", "device", "constant", "restrict"}
    kind = " ".join(word for word in words if word not in dropped)
    writable = space == "device" and "const" not in words
    index = int(place[1]) if place else position
    return Parameter(pointer[3], kind, space, writable, pointer[2] == "*", index)


def _template(text: str | None) -> dict[str, str | None]:
    names: dict[str, str | None] = {}
    for part in _split(text or ""):
        declared, _, default = part.partition("=")
        names[declared.split()[-1]] = default.strip() or None
    return names
