"""Metal source to what clang's C++ for OpenCL accepts. Hardly anything is rewritten:

- a kernel template becomes the one instance asked for (OpenCL has no kernel templates);
- function constants get their values;
- other kernels of the same text go, their lines stay;
- `vec<T, 4>(…)` and `1.0bf`, which clang cannot read, become calls;
- an entry is added that hands the kernel its buffers and positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from localllm.kernels_metal.emulator.faults import KernelFault, Place

Value = str | int | bool
Space = Literal["device", "constant"]

# Attribute -> the first of its numbers for msl_builtin, and whether it has three components.
_ATTRIBUTES: dict[str, tuple[int, bool]] = {
    "thread_position_in_grid": (0, True),
    "thread_position_in_threadgroup": (3, True),
    "threadgroup_position_in_grid": (6, True),
    "threads_per_grid": (9, True),
    "grid_size": (9, True),
    "threads_per_threadgroup": (12, True),
    "dispatch_threads_per_threadgroup": (15, True),
    "threadgroups_per_grid": (18, True),
    "thread_index_in_threadgroup": (21, False),
    "thread_index_in_simdgroup": (22, False),
    "simdgroup_index_in_threadgroup": (23, False),
    "simdgroups_per_threadgroup": (24, False),
    "threads_per_simdgroup": (25, False),
    "thread_execution_width": (25, False),
    "thread_index_in_quadgroup": (26, False),
    "quadgroup_index_in_threadgroup": (27, False),
    "quadgroups_per_threadgroup": (28, False),
    "dispatch_simdgroups_per_threadgroup": (29, False),
}
_KERNEL = re.compile(
    r"(?:template\s*<([^{};]*?)>\s*)?"
    r"(?:\[\[\s*kernel[^\]]*\]\]|(?<![\w:])kernel(?=\s+void\b))\s*void\s+(\w+)\s*\("
)
_INSTANCE = re.compile(r"\ntemplate \[\[host_name\([^\n]*?decltype\((\w+)<([^\n]*)>\)[^\n]*;")
_INSTANCES = re.compile(r"\ntemplate \[\[host_name\([^\n]*;")
_LITERAL = re.compile(r"(?<![\w.])(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)bf\b")
_VEC = re.compile(r"(?<![\w:])((?:metal::)?vec<\s*[\w:]+\s*,\s*[\w:]+\s*>)\s*\(")


@dataclass(frozen=True)
class BufferParameter:
    """A parameter of the kernel that is memory. index: its number among Metal's buffers."""

    name: str
    index: int
    space: Space
    read_only: bool


@dataclass(frozen=True)
class Lowered:
    """text: without any preamble. name: of the kernel."""

    text: str
    name: str
    buffers: tuple[BufferParameter, ...]


def lower(
    text: str,
    template: Mapping[str, Value] | None = None,
    kernel: str | None = None,
    constants: Mapping[str, Value] | None = None,
    file: str = "kernel.metal",
) -> Lowered:
    """kernel: which one, if the text has several. template: its arguments by name; None takes
    those of the instance that the text itself asks for. constants: values of function constants.

    Raises KernelFault for what cannot be lowered; its lines are those of `text`, in `file`.
    """
    text = _with_constants(text, constants or {})
    instances = {match[1]: match[2] for match in _INSTANCE.finditer(text)}
    text = _INSTANCES.sub("\n", text)
    text = _LITERAL.sub(r"bfloat(\1f)", text)
    text = _VEC.sub(r"msl_make<\1>(", text)
    found = _find(text, kernel, file)
    name = found[2]
    text = _without_other_kernels(text, name)
    found = _find(text, name, file)
    declared = ""
    if found[1]:
        given = _arguments_of(found[1], template, instances.get(name))
        declared = _declarations(found[1], given, name)
    end = _closing(text, found.end() - 1)
    parameters = text[found.end() : end]
    lines = "\n" * found[0].count("\n")
    buffers, call = _parameters(
        parameters, name, Place(file, text[: found.start()].count("\n") + 1)
    )
    lowered = (
        f"{text[: found.start()]}{declared}{lines}__kernel void {name}({text[found.end() :]}\n"
        'extern "C" ulong msl_buffer(uint);\n'
        f"__kernel void msl_entry() {{ {name}({', '.join(call)}); }}\n"
    )
    return Lowered(lowered, name, buffers)


def _find(text: str, kernel: str | None, file: str) -> re.Match[str]:
    for match in _KERNEL.finditer(text):
        if kernel in (None, match[2]):
            return match
    wanted = f"the kernel `{kernel}`" if kernel else "a function marked [[kernel]]"
    raise KernelFault(
        f"there is no {wanted}", kernel=kernel or file, stage="compile", kind="no kernel"
    )


def _closing(text: str, opening: int) -> int:
    """Where the bracket at `opening` closes."""
    pairs = {"(": ")", "{": "}"}
    depth, left, right = 0, text[opening], pairs[text[opening]]
    for i in range(opening, len(text)):
        depth += (text[i] == left) - (text[i] == right)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced {left}")


def _without_other_kernels(text: str, keep: str) -> str:
    parts, last = [], 0
    for match in _KERNEL.finditer(text):
        if match[2] == keep or match.start() < last:
            continue
        end = _closing(text, text.index("{", _closing(text, match.end() - 1))) + 1
        parts += [text[last : match.start()], "\n" * text[match.start() : end].count("\n")]
        last = end
    return "".join(parts) + text[last:]


def _with_constants(text: str, constants: Mapping[str, Value]) -> str:
    for name, value in constants.items():
        text = re.sub(
            rf"constant (\w+) {name} \[\[function_constant\(\d+\)\]\];",
            rf"constant constexpr \1 {name} = {_written(value)};",
            text,
        )
    return text


def _written(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def split(text: str) -> list[str]:
    """At the commas that no bracket encloses."""
    parts, depth, part = [], 0, ""
    for char in text:
        if char == "," and depth == 0:
            parts.append(part.strip())
            part = ""
            continue
        depth += (char in "([{<") - (char in ")]}>")
        part += char
    return [*parts, part.strip()] if part.strip() else parts


def _arguments_of(
    template: str, given: Mapping[str, Value] | None, instance: str | None
) -> Mapping[str, Value]:
    if given is not None or instance is None:
        return given or {}
    names = [_template_name(parameter) for parameter in split(template)]
    return dict(zip(names, split(instance), strict=False))


def _template_name(parameter: str) -> str:
    return parameter.partition("=")[0].split()[-1]


def _declarations(template: str, given: Mapping[str, Value], kernel: str) -> str:
    text = ""
    for parameter in split(template):
        declaration, _, default = (part.strip() for part in parameter.partition("="))
        kind, name = re.sub(r"\bconst\s+", "", declaration).rsplit(None, 1)
        value = given.get(name, default)
        if value == "":
            raise KernelFault(
                f"template parameter `{name}` has no value",
                kernel=kernel, stage="compile", kind="template",
            )  # fmt: skip
        if kind in ("typename", "class"):
            text += f"typedef {value} {name}; "
        else:
            text += f"static constant constexpr {kind} {name} = {_written(value)}; "
    return text


def _parameters(
    text: str, kernel: str, place: Place
) -> tuple[tuple[BufferParameter, ...], list[str]]:
    """The buffers of a kernel's parameters, and the arguments with which the entry calls it."""
    buffers: list[BufferParameter] = []
    call: list[str] = []
    for parameter in split(text):
        bare = " ".join(re.sub(r"\[\[.*?\]\]", "", parameter, flags=re.DOTALL).split())
        matched = re.fullmatch(r"(.*?)(\w+)", bare, re.DOTALL)
        if matched is None:
            raise _unsupported(parameter, kernel, place)
        kind, name = matched[1].strip(), matched[2]
        numbered = re.search(r"\[\[\s*buffer\((\d+)\)\s*[\],]", parameter)
        attribute = re.search(r"\[\[\s*(\w+)\s*\]\]", parameter)
        if numbered or (attribute is None and kind[-1:] in ("*", "&")):
            index = int(numbered[1]) if numbered else len(buffers)
            space: Space = "constant" if re.search(r"\bconstant\b", kind) else "device"
            read_only = space == "constant" or re.search(r"\bconst\b", kind) is not None
            buffers.append(BufferParameter(name, index, space, read_only))
            pointer = f"({kind[:-1].strip()}*)msl_buffer({index})"
            call.append(f"*{pointer}" if kind.endswith("&") else pointer)
            continue
        if attribute is None or attribute[1] not in _ATTRIBUTES:
            raise _unsupported(parameter, kernel, place)
        first, has_axes = _ATTRIBUTES[attribute[1]]
        size = int(kind[-1]) if kind[-1] in "23" else 1
        parts = [f"msl_builtin({first + i})" for i in range(size if has_axes else 1)]
        call.append(f"({kind}){{{', '.join(parts)}}}" if size > 1 else f"({kind}){parts[0]}")
    return tuple(buffers), call


def _unsupported(parameter: str, kernel: str, place: Place) -> KernelFault:
    return KernelFault(
        f"parameter `{' '.join(parameter.split())}` is neither a buffer nor a known attribute",
        kernel=kernel, stage="compile", kind="parameter", place=place,
    )  # fmt: skip
