"""Runs a complete Metal source, such as one would give to `xcrun metal`, on plain buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from localllm.kernels_metal.emulator import msl
from localllm.kernels_metal.emulator.counters import Counters
from localllm.kernels_metal.emulator.emulator import Emulator, KernelFault
from localllm.kernels_metal.kernel import Launch, MetalKernel, Size

_PREAMBLE = "#include <metal_stdlib>\n#pragma GCC poison double\n"


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
    """buffers: what they hold afterwards, in the order given."""

    kernel: str
    buffers: list[np.ndarray]
    counters: Counters


def check_plain(kernel: PlainKernel) -> None:
    """Type-checks and compiles only. Raises KernelFault."""
    _program(kernel)


def run_plain(
    emulator: Emulator,
    kernel: PlainKernel,
    buffers: Sequence[np.ndarray],
    grid: Size,
    threadgroup: Size,
) -> PlainRun:
    """buffers: by their [[buffer(i)]] index; bfloat16 as uint16. Raises KernelFault."""
    program = _program(kernel)
    held = [np.ascontiguousarray(buffer).reshape(-1).copy() for buffer in buffers]
    order = ("forward", "reverse", "random").index(emulator.order)
    try:
        program.run(held, grid, threadgroup, order=order, seed=emulator.seed)
    except msl.RunError as error:
        raise KernelFault(f"{program.name}: {error}") from error
    shaped = [after.reshape(before.shape) for after, before in zip(held, buffers, strict=True)]
    return PlainRun(program.name, shaped, Counters(**program.stats))


def _program(kernel: PlainKernel) -> msl.Program:
    try:
        lowered, name = msl.lower(
            kernel.source, dict(kernel.template), kernel.name, dict(kernel.constants)
        )
        first = msl.PRE if kernel.with_mlx else _PREAMBLE
        return msl.Program(first + f'#line 1 "{kernel.file}"\n' + lowered, name)
    except msl.CompileError as error:
        raise KernelFault(f"{kernel.name or kernel.file}: {error}") from error


def traced_source(kernel: MetalKernel, launch: Launch) -> str:
    """Exactly the text that MLX would compile for this call, after its own preamble."""
    return msl.metal_source(
        kernel.built,
        inputs=list(launch.inputs),
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[tuple(shape) for shape in launch.output_shapes],
        output_dtypes=list(launch.output_dtypes),
        init_value=launch.init_value,
    )
