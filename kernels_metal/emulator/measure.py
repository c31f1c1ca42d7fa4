"""One contest under the emulator: is it right, and what do our kernel and MLX's move for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.emulator.emulator import Emulator
from localllm.kernels_metal.emulator.faults import KernelFault
from localllm.kernels_metal.emulator.mlx_costs import MlxCost, Recorder, mlx_cost
from localllm.kernels_metal.emulator.mlx_kernels import Gpu
from localllm.kernels_metal.emulator.program import Order
from localllm.kernels_metal.kernel import Launch, MetalKernel, executed_by


@dataclass(frozen=True)
class Measured:
    """error: the largest difference from the truth, relative to the truth's largest value, the
    worst of all outputs. moved: bytes, of the dispatches. around: of the MLX ops before and
    after them, each input and output once; a contest that unpacks a result to compare it has some
    on both sides. seconds: the emulator's, with counting, of the first lane order."""

    contest: Contest
    error: float
    moved: int
    around: int
    dispatches: int
    seconds: float

    @property
    def right(self) -> bool:
        return self.error <= self.contest.tolerance

    @property
    def to_least(self) -> float:
        return self.moved / self.contest.least_bytes


def contests_of(kernel: str, dtype: mx.Dtype) -> list[Contest] | None:
    """None where there is no such kernel (yet)."""
    try:
        module = import_module(f"localllm.kernels_metal.{kernel}")
    except ModuleNotFoundError:
        return None
    make: Callable[[mx.Dtype], Sequence[Contest]] | None = getattr(module, "contests", None)
    return None if make is None else list(make(dtype))


def measure(contest: Contest, orders: Sequence[Order] = ("forward",), seed: int = 1) -> Measured:
    """Raises KernelFault, also where two lane orders give different bits."""
    results = []
    with executed_by(_Settling()):
        contest.ours()
    for order in orders:
        emulator = Emulator(order=order, seed=seed)
        recorder = Recorder(emulator, Gpu())
        start = time.perf_counter()
        with executed_by(_Counting(emulator, recorder)):
            outputs = contest.ours()
            recorder.walk(outputs)
            mx.eval(outputs)
        results.append((outputs, recorder.cost, time.perf_counter() - start))
    outputs, cost, seconds = results[0]
    for order, (others, _, _) in zip(orders[1:], results[1:], strict=True):
        for index, (one, other) in enumerate(zip(outputs, others, strict=True)):
            if bits(one) != bits(other):
                raise KernelFault(
                    f"{contest.work}: output {index} differs between lane orders {orders[0]} and "
                    f"{order}",
                    kernel=contest.kernel,
                    stage="run",
                    kind="lane order",
                )
    own = [step.moved for step in cost.steps if step.measured]
    error = _error(outputs, contest.truth())
    return Measured(contest, error, sum(own), cost.moved - sum(own), len(own), seconds)


def measure_mlx(contest: Contest, gpu: Gpu | None = None) -> MlxCost | None:
    """What MLX's way moves; None where it has none. Raises ShippedSourceMissing."""
    if contest.mlx is None:
        return None
    return mlx_cost(Emulator(), contest.mlx, gpu)


def bits(array: mx.array) -> bytes:
    raw = mx.contiguous(array).view(mx.uint8) if array.ndim else array.reshape(1).view(mx.uint8)
    mx.eval(raw)
    return np.array(raw).tobytes()


class _Settling:
    """Computes what a kernel is called with, so that what is made once is not counted as work."""

    def execute(self, kernel: MetalKernel, launch: Launch) -> list[mx.array]:
        mx.eval(list(launch.inputs))
        return [
            mx.zeros(shape, dtype)
            for shape, dtype in zip(launch.output_shapes, launch.output_dtypes, strict=True)
        ]


class _Counting:
    """Counts the MLX ops that lead to a kernel, then the kernel."""

    def __init__(self, emulator: Emulator, recorder: Recorder) -> None:
        self.emulator, self.recorder = emulator, recorder

    def execute(self, kernel: MetalKernel, launch: Launch) -> list[mx.array]:
        inputs = list(launch.inputs)
        self.recorder.walk(inputs)
        mx.eval(inputs)
        dispatch = self.emulator.run(kernel, launch)
        self.recorder.add(kernel.name, dispatch.counters.moved)
        return dispatch.outputs


def _error(outputs: Sequence[mx.array], truths: Sequence[np.ndarray]) -> float:
    worst = 0.0
    for output, truth in zip(outputs, truths, strict=True):
        found = np.array(output.astype(mx.float32), np.float64)
        largest = float(np.abs(truth).max()) or 1.0
        # A NaN is an error of infinity, which no tolerance covers.
        worst = max(worst, float(np.nan_to_num(np.abs(found - truth), nan=np.inf).max()) / largest)
    return worst
