"""A Metal kernel: its source, and calling it on the GPU or in the emulator."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from localllm.errors import BackendUnavailable

_FOLDER = resources.files("localllm.kernels_metal")
_BODY = "//: body\n"
_INCLUDE = re.compile(r'#include "(\w+\.metal)"\n')

# A template argument: a dtype, an integer or a truth value, by its name in the source.
Template = Sequence[tuple[str, mx.Dtype | int | bool]]
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, as `mx.fast.metal_kernel` takes it.

    grid: threads in all (not threadgroups); threadgroup: threads in one. init_value: what the
    outputs hold before; None leaves them unset.
    """

    inputs: Sequence[mx.array]
    grid: Size
    threadgroup: Size
    output_shapes: Sequence[tuple[int, ...]]
    output_dtypes: Sequence[mx.Dtype]
    template: Template = ()
    init_value: float | None = None


class SourceLine(NamedTuple):
    """A line, with its end, and where it is written."""

    text: str
    file: str
    number: int


class Executor(Protocol):
    """What runs kernels where there is no GPU; the emulator is one."""

    def execute(self, kernel: MetalKernel, launch: Launch) -> list[mx.array]: ...


_executor: ContextVar[Executor | None] = ContextVar("executor", default=None)


@contextmanager
def executed_by(executor: Executor) -> Iterator[None]:
    """Within it, every kernel called from this context runs in `executor`, even on a Mac."""
    token = _executor.set(executor)
    try:
        yield
    finally:
        _executor.reset(token)


class MetalKernel:
    """`NAME.metal` of this package, built once.

    The file has helpers, a line `//: body`, and the body of the kernel; MLX writes the signature
    around it, from the names of inputs and outputs and from which of `thread_position_in_grid`,
    `x_shape`, … the body mentions. `#include "other.metal"` takes in a file without a body.
    macros: what the file finds defined, such as the names of inputs whose number varies.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        macros: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._macros = macros or {}

    @cached_property
    def header(self) -> str:
        return "".join(line.text for line in self.lines[0])

    @cached_property
    def source(self) -> str:
        return "".join(line.text for line in self.lines[1])

    @cached_property
    def lines(self) -> tuple[list[SourceLine], list[SourceLine]]:
        """Of the header and of the body."""
        all_lines = _expanded(f"{self.name}.metal", set())
        (at,) = (i for i, line in enumerate(all_lines) if line.text == _BODY)
        before = ["using namespace metal;\n"]
        before += [f"#define {name} {text}\n" for name, text in self._macros.items()]
        own = [SourceLine(line, f"{self.name}.metal", 1) for line in before]
        return [*own, *all_lines[:at]], all_lines[at + 1 :]

    @cached_property
    def built(self) -> Any:
        """The object of `mx.fast.metal_kernel`."""
        variant = f"_{len(self.inputs)}" if self._macros else ""  # MLX keeps what it built by name
        return mx.fast.metal_kernel(
            name=f"localllm_{self.name}{variant}",
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=self.source,
            header=self.header,
        )

    def __call__(self, launch: Launch) -> list[mx.array]:
        """The outputs. Raises BackendUnavailable where there is neither GPU nor emulator."""
        executor = _executor.get()
        if executor is not None:
            return executor.execute(self, launch)
        if not mx.metal.is_available():
            raise BackendUnavailable(
                f"the Metal kernel {self.name} cannot run here: there is no Apple GPU",
                hint="the emulator runs it: localllm.kernels_metal.emulator",
            )
        outputs: list[mx.array] = self.built(
            inputs=list(launch.inputs),
            template=list(launch.template),
            grid=launch.grid,
            threadgroup=launch.threadgroup,
            output_shapes=[tuple(shape) for shape in launch.output_shapes],
            output_dtypes=list(launch.output_dtypes),
            init_value=launch.init_value,
        )
        return outputs


def _expanded(name: str, seen: set[str]) -> list[SourceLine]:
    """The lines of a source, each file that it includes taken in once."""
    if name in seen:
        return []
    seen.add(name)
    lines: list[SourceLine] = []
    text = (_FOLDER / name).read_text(encoding="ascii")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if included := _INCLUDE.match(line):
            lines += _expanded(included[1], seen)
        else:
            lines.append(SourceLine(line, name, number))
    return lines
