"""Runs a complete Metal source, such as one would give to `xcrun metal`, on plain buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from localllm.kernels_metal.emulator import compiler
from localllm.kernels_metal.emulator.counters import Counters
from localllm.kernels_metal.emulator.emulator import Emulator
from localllm.kernels_metal.emulator.lower import lower
from localllm.kernels_metal.emulator.program import Argument, Program, Traffic
from localllm.kernels_metal.kernel import Size

_METAL_ALONE = "#include <metal_stdlib>\n" + compiler.RULES


@dataclass(frozen=True)
class PlainKernel:
    """source: Metal text with one kernel or several. name: the one to run; None where there is one.

    template: the arguments of a kernel template, as C++ text ("half", "64", "true"). constants:
    the values of function constants, likewise. file: what messages call the source. with_mlx:
    whether MLX's utils.h comes first, as it does for everything that MLX compiles.
    """

    source: str
    name: str | None = None
    template: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    file: str = "kernel.metal"
    with_mlx: bool = False


@dataclass(frozen=True)
class PlainRun:
    """buffers: what they hold afterwards, in the order given. traffic: by the parameter's name."""

    kernel: str
    buffers: list[np.ndarray]
    counters: Counters
    traffic: Mapping[str, Traffic]


def check_plain(kernel: PlainKernel) -> None:
    """Type-checks and compiles only. Raises KernelFault."""
    program_of(kernel, count=False)


def run_plain(
    emulator: Emulator,
    kernel: PlainKernel,
    buffers: Sequence[np.ndarray],
    grid: Size,
    threadgroup: Size,
) -> PlainRun:
    """buffers: by their [[buffer(i)]] index; bfloat16 as uint16. One that the kernel may write and
    whose every bit is set counts as never written before. Raises KernelFault."""
    program = program_of(kernel, emulator.count)
    after = list(buffers)
    arguments = []
    for parameter in program.buffers:
        array = np.ascontiguousarray(buffers[parameter.index])
        if not parameter.read_only:
            array = array.copy()
            after[parameter.index] = array
        blank = not parameter.read_only and bool((array.reshape(-1).view(np.uint8) == 0xFF).all())
        arguments.append(Argument(array, initialised=not blank))
    counters = program.run(arguments, grid, threadgroup, emulator.options)
    return PlainRun(program.name, after, counters, dict(program.traffic))


def program_of(kernel: PlainKernel, count: bool) -> Program:
    """Raises KernelFault."""
    template, constants = tuple(kernel.template.items()), tuple(kernel.constants.items())
    return _program(
        kernel.source, kernel.name, template, constants, kernel.file, kernel.with_mlx, count
    )


@lru_cache(maxsize=64)
def _program(
    source: str,
    name: str | None,
    template: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, str], ...],
    file: str,
    with_mlx: bool,
    count: bool,
) -> Program:
    lowered = lower(source, dict(template), name, dict(constants), file)
    preamble = compiler.PREAMBLE if with_mlx else _METAL_ALONE
    return Program(lowered, preamble=preamble, file=file, count=count)
