"""The emulator as an executor of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.emulator import trace
from localllm.kernels_metal.emulator.counters import Counters
from localllm.kernels_metal.emulator.faults import KernelFault, Place
from localllm.kernels_metal.emulator.lower import lower
from localllm.kernels_metal.emulator.program import (
    CACHE_BYTES,
    Argument,
    Options,
    Order,
    Placement,
    Program,
)
from localllm.kernels_metal.kernel import Launch, MetalKernel, SourceLine

_DISPATCHES_KEPT = 1000
_PROGRAMS_KEPT = 512


@dataclass(frozen=True)
class Dispatch:
    """One launch that ran."""

    kernel: str
    outputs: list[mx.array]
    counters: Counters


class Emulator:
    """Runs Metal kernels in lockstep on the CPU and raises KernelFault for what breaks a rule.

    order, seed: in which order threads take turns between the places where they meet; a kernel
    without faults gives the same bits in every order.
    strict: an operation of a simdgroup that some lanes have left is a fault too; Metal lets the
    others go on, but what they get is seldom what was meant.
    initialised: a load of memory that nothing was stored to is a fault too. Kernels that read a
    whole tile and use a part of it do so; else see `Counters.uninitialised`.
    count: watch every access: exact bounds, alignment, races, counters. Without it only guard
    pages around the buffers are left, and a run is some times faster.
    placement: whether buffers end ("high") or start at a guard page; for runs without `count`.
    cache_bytes: of the cache that `Counters.moved` assumes.

    Programs are compiled once for a source and kept on disk; see `cache.folder`.
    """

    def __init__(
        self,
        *,
        order: Order = "forward",
        seed: int = 1,
        strict: bool = False,
        initialised: bool = False,
        count: bool = True,
        placement: Placement = "high",
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.options = Options(order, seed, strict, initialised, placement, cache_bytes)
        self.count = count
        self.dispatches: list[Dispatch] = []

    def execute(self, kernel: MetalKernel, launch: Launch) -> list[mx.array]:
        return self.run(kernel, launch).outputs

    def run(self, kernel: MetalKernel, launch: Launch) -> Dispatch:
        """Raises KernelFault."""
        program = _program(kernel, launch, self.count)
        outputs = [
            _blank(tuple(shape), dtype, launch.init_value)
            for shape, dtype in zip(launch.output_shapes, launch.output_dtypes, strict=True)
        ]
        by_name = dict(_inputs(kernel, launch))
        for name, array in zip(kernel.outputs, outputs, strict=True):
            by_name[name] = Argument(array, initialised=launch.init_value is not None)
        counters = program.run(
            [by_name[buffer.name] for buffer in program.buffers],
            launch.grid,
            launch.threadgroup,
            self.options,
        )
        arrays = [
            _to_mlx(array, dtype)
            for array, dtype in zip(outputs, launch.output_dtypes, strict=True)
        ]
        dispatch = Dispatch(kernel.name, arrays, counters)
        self.dispatches.append(dispatch)
        del self.dispatches[:-_DISPATCHES_KEPT]
        return dispatch


_programs: dict[tuple[object, ...], Program] = {}


def _program(kernel: MetalKernel, launch: Launch, count: bool) -> Program:
    """The program of a launch. What MLX generates depends on nothing but these."""
    key = (
        kernel.name, kernel.header, kernel.source, kernel.inputs, kernel.outputs, count,
        tuple(launch.template), tuple(launch.output_dtypes), launch.init_value is None,
        *((array.dtype, array.ndim == 0, array.size < 8) for array in launch.inputs),
    )  # fmt: skip
    found = _programs.pop(key, None)
    if found is None:
        _ascii_only(kernel)
        try:
            text = trace.generated(kernel.built, launch)
        except (ValueError, RuntimeError, TypeError) as error:
            raise KernelFault(
                f"MLX refuses the call: {error}", kernel=kernel.name, stage="compile", kind="call"
            ) from error
        lowered = lower(_with_lines(text, kernel))
        found = Program(lowered, title=kernel.name, count=count)
    _programs[key] = found
    while len(_programs) > _PROGRAMS_KEPT:
        del _programs[next(iter(_programs))]
    return found


def _ascii_only(kernel: MetalKernel) -> None:
    """MLX hands Metal its text as an ASCII string, comments and all."""
    for line in (*kernel.lines[0], *kernel.lines[1]):
        if not line.text.isascii():
            raise KernelFault(
                f"a character that is not ASCII: {line.text.strip()!r}",
                kernel=kernel.name,
                stage="compile",
                kind="not ASCII",
                place=Place(line.file, line.number),
            )


def _with_lines(text: str, kernel: MetalKernel) -> str:
    """MLX's text with `#line` where our own files begin and break off, so that messages name the
    lines that a person edits."""
    header, body = (_numbered(lines) for lines in kernel.lines)
    text = text.replace(kernel.header, f'{header}#line 1 "signature of {kernel.name}"\n', 1)
    return text.replace(kernel.source, f"{body}\n", 1)


def _numbered(lines: list[SourceLine]) -> str:
    numbered, expected = "", ("", 0)
    for line in lines:
        if (line.file, line.number) != expected:
            numbered += f'#line {line.number} "{line.file}"\n'
        numbered += line.text
        expected = (line.file, line.number + 1)
    return numbered


def _inputs(kernel: MetalKernel, launch: Launch) -> Iterator[tuple[str, Argument]]:
    """Buffers by name: the inputs, and what MLX adds to them where the source speaks of it."""
    for name, array in zip(kernel.inputs, launch.inputs, strict=True):
        yield name, Argument(_to_numpy(array))
        shape = array.shape
        strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        yield f"{name}_shape", Argument(np.array(shape, np.int32))
        yield f"{name}_strides", Argument(np.array(strides, np.int64))
        yield f"{name}_ndim", Argument(np.array([array.ndim], np.int32))


def _to_numpy(array: mx.array) -> np.ndarray:
    array = mx.contiguous(array)
    return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _to_mlx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(array)


_NUMPY = {
    mx.bool_: np.bool_, mx.int8: np.int8, mx.uint8: np.uint8, mx.int16: np.int16,
    mx.uint16: np.uint16, mx.int32: np.int32, mx.uint32: np.uint32, mx.int64: np.int64,
    mx.uint64: np.uint64, mx.float16: np.float16, mx.bfloat16: np.uint16, mx.float32: np.float32,
}  # fmt: skip


def _blank(shape: tuple[int, ...], dtype: mx.Dtype, value: float | None) -> np.ndarray:
    """An output before the run: the value that was asked for, else ones in every bit."""
    if value is None:
        blank = np.empty(shape, _NUMPY[dtype])
        blank.reshape(-1).view(np.uint8)[:] = 0xFF  # NaN in every float
        return blank
    filled = mx.full(shape, value, dtype)
    return np.array(_to_numpy(filled))
