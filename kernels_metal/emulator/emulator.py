"""The emulator as an executor of kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from localllm.errors import LocalLLMError
from localllm.kernels_metal.emulator import msl
from localllm.kernels_metal.kernel import Launch, MetalKernel

Order = Literal["forward", "reverse", "random"]


class KernelFault(LocalLLMError):
    """A kernel that breaks a rule of Metal, when compiled or while it runs."""


@dataclass(frozen=True)
class Dispatch:
    """One launch that ran. counters: see `Counters`."""

    kernel: str
    outputs: list[mx.array]
    counters: dict[str, int]


class Emulator:
    """order, seed: in which order lanes take turns. strict: a simdgroup function that runs with
    some lanes gone is a fault. Programs are compiled once for a source, on disk."""

    def __init__(self, *, order: Order = "forward", seed: int = 1, strict: bool = False) -> None:
        self.order, self.seed, self.strict = order, seed, strict
        self.dispatches: list[Dispatch] = []

    def execute(self, kernel: MetalKernel, launch: Launch) -> list[mx.array]:
        return self.run(kernel, launch).outputs

    def run(self, kernel: MetalKernel, launch: Launch) -> Dispatch:
        """Raises KernelFault."""
        emulated = msl.Emulated(
            kernel.name, list(kernel.inputs), list(kernel.outputs), kernel.source, kernel.header
        )
        order = ("forward", "reverse", "random").index(self.order)
        try:
            outputs: list[Any] = emulated(
                list(launch.inputs), launch.output_shapes, launch.output_dtypes,
                launch.grid, launch.threadgroup, launch.template, launch.init_value,
                order=order, seed=self.seed, strict=int(self.strict),
            )
        except (msl.CompileError, msl.RunError) as error:
            raise KernelFault(f"{kernel.name}: {error}") from error
        dispatch = Dispatch(kernel.name, outputs, dict(emulated.prog.stats))
        self.dispatches.append(dispatch)
        del self.dispatches[:-1000]
        return dispatch
