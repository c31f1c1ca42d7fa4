"""MLX's own kernels in the emulator: which one MLX picks for a shape, and what it moves.

Which kernel, which tile and which grid follow the dispatch rules of MLX 0.32 (quantized.cpp,
scaled_dot_product_attention.cpp, softmax.cpp, as published); the kernels themselves are the
installed ones. On an M5 MLX may take kernels for its tensor units instead, which cannot run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from localllm.errors import LocalLLMError
from localllm.kernels_metal.emulator.arrays import TYPE_NAMES, empty, to_mlx, to_numpy
from localllm.kernels_metal.emulator.emulator import Emulator
from localllm.kernels_metal.emulator.faults import KernelFault
from localllm.kernels_metal.emulator.mlx_sources import mlx_version, shipped_source, unused_edits
from localllm.kernels_metal.emulator.plain import PlainKernel, PlainRun, run_plain
from localllm.kernels_metal.kernel import Size


@dataclass(frozen=True)
class Gpu:
    """What MLX's rules ask of the chip. generation: 13 is M1 … 16 is M4. size: the last letter of
    its architecture's name: "g" plain, "s" Pro or Max, "d" Ultra."""

    generation: int = 16
    size: str = "s"


@dataclass(frozen=True)
class MlxRun:
    """One call of MLX. output: as MLX would return it. runs: its dispatches. least_bytes: of steps
    whose kernel is not in the wheel, counted as each input and output once."""

    output: mx.array
    runs: tuple[PlainRun, ...]
    least_bytes: int = 0

    @property
    def kernels(self) -> str:
        return " + ".join(run.kernel for run in self.runs)

    @property
    def moved(self) -> int:
        return sum(run.counters.moved for run in self.runs) + self.least_bytes


class ShippedKernelFault(LocalLLMError):
    """The emulator finds a fault in a kernel of MLX: one of the two is wrong, or MLX changed."""


class NoSuchKernel(LocalLLMError):
    """MLX has no kernel of its own for this shape and falls back to several simpler ones."""


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def flag(value: bool) -> str:
    return "true" if value else "false"


def run_shipped(
    emulator: Emulator,
    files: Sequence[str],
    name: str,
    template: Mapping[str, str],
    constants: Mapping[str, str],
    buffers: Sequence[np.ndarray],
    threadgroups: Size,
    threadgroup: Size,
) -> PlainRun:
    """Runs kernel `name` of the last of `files`.

    Raises ShippedKernelFault, ShippedSourceMissing.
    """
    kernel = PlainKernel(
        shipped_source(files[-1], *files[:-1]), name, template, constants, files[-1], True
    )
    grid = tuple(groups * size for groups, size in zip(threadgroups, threadgroup, strict=True))
    try:
        return run_plain(emulator, kernel, buffers, (grid[0], grid[1], grid[2]), threadgroup)
    except KernelFault as fault:
        unused = ", ".join(edit.file for edit in unused_edits())
        changed = f"; not found any more: the text to edit in {unused}" if unused else ""
        raise ShippedKernelFault(
            f"MLX {mlx_version()}: {fault}{changed}",
            hint="this MLX may ship the kernel in another form than MLX 0.32",
        ) from fault


# -- softmax


def softmax(emulator: Emulator, x: mx.array) -> MlxRun:
    """Over the last axis of x [rows, n], n <= 4096, as `mx.softmax(x, axis=-1)`."""
    rows, n = x.shape
    reads = 4  # SOFTMAX_N_READS
    threads = -(-n // (reads * 32)) * 32
    if n > 4096:
        raise NoSuchKernel(f"the one-row softmax of MLX takes 4096 values, not {n}")
    run = run_shipped(
        emulator,
        ["softmax.h"],
        "softmax_single_row",
        {"T": TYPE_NAMES[x.dtype], "AccT": "float", "N_READS": str(reads)},
        {},
        [to_numpy(x), empty(x.shape, x.dtype), int32(n)],
        (rows, 1, 1),
        (threads, 1, 1),
    )
    return MlxRun(to_mlx(run.buffers[1], x.dtype), (run,))
