"""What MLX's own way of doing some work moves between memory and chip.

Kernels that ship as source in the wheel (quantized matmul, fused attention) run in the emulator and
are measured. The others (elementwise ops, norms, matmuls, sorts, copies) cannot run here, and count
as each of their inputs read once and each output written once: at least that much. Reshaping counts
as nothing, although MLX copies where the layout asks for it. So the sum never overstates MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from localllm.errors import LocalLLMError
from localllm.kernels_metal.emulator.emulator import Emulator
from localllm.kernels_metal.emulator.mlx_attention import attention
from localllm.kernels_metal.emulator.mlx_kernels import (
    Gpu,
    MlxRun,
    NoSuchKernel,
    ShippedKernelFault,
)
from localllm.kernels_metal.emulator.mlx_matmul import quantized_matmul

# Primitives that give another view of the same bytes, or may.
_VIEWS = frozenset(
    [
        "AsStrided",
        "Broadcast",
        "BroadcastAxes",
        "Contiguous",
        "Copy",
        "Depends",
        "DynamicSlice",
        "ExpandDims",
        "Flatten",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "StopGradient",
        "Transpose",
        "Unflatten",
        "View",
    ]
)
# Primitives that read as much of their first input as they write.
_PICKERS = frozenset(("Gather", "GatherAxis"))
_AGREEMENT = 0.02  # of the largest value: MLX's kernel here and MLX's op on the CPU, any dtype


@dataclass(frozen=True)
class Step:
    """One kernel of MLX. measured: in the emulator; otherwise `moved` is the least it can be."""

    name: str
    moved: int
    measured: bool


@dataclass
class MlxCost:
    steps: list[Step] = field(default_factory=list)

    @property
    def moved(self) -> int:
        return sum(step.moved for step in self.steps)

    @property
    def measured(self) -> bool:
        """Whether every byte was; if not, MLX moves at least this much."""
        return all(step.measured for step in self.steps)


def mlx_cost(
    emulator: Emulator, work: Callable[[], list[mx.array]], gpu: Gpu | None = None
) -> MlxCost:
    """Runs `work` with MLX's ops and counts. Raises ShippedSourceMissing."""
    for dry in (True, False):  # what is made once, such as weights, is there the second time
        recorder = Recorder(emulator, gpu or Gpu(), dry=dry)
        with recorder.listening():
            outputs = work()
            recorder.walk(outputs)
    return recorder.cost


class Recorder:
    """Takes the place of MLX's fused ops: counts what leads to them, then them.

    dry: no kernel runs; what leads to them is computed.
    """

    def __init__(self, emulator: Emulator, gpu: Gpu, *, dry: bool = False) -> None:
        self.emulator, self.gpu, self.dry = emulator, gpu, dry
        self.cost = MlxCost()

    def add(self, name: str, moved: int) -> None:
        """A kernel that was measured."""
        self.cost.steps.append(Step(name, moved, measured=True))

    @contextmanager
    def listening(self) -> Iterator[None]:
        replaced = [
            (mx, "quantized_matmul", self._quantized_matmul),
            (mx, "gather_mm", self._gather_mm),
            (mx, "quantize", self._once("quantize")),
            (mx.fast, "scaled_dot_product_attention", self._attention),
            (mx.fast, "rms_norm", self._once("rms_norm")),
            (mx.fast, "layer_norm", self._once("layer_norm")),
            (mx.fast, "rope", self._once("rope")),
        ]
        kept = [(module, name, getattr(module, name)) for module, name, _ in replaced]
        try:
            for (module, name, wrapped), (_, _, original) in zip(replaced, kept, strict=True):
                setattr(module, name, _bound(wrapped, original))
            yield
        finally:
            for module, name, original in kept:
                setattr(module, name, original)

    # -- ops with a kernel in the wheel

    def _quantized_matmul(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        x, codes, scales, biases = args[:4] if len(args) >= 4 else (*args, options.get("biases"))
        plain = options.get("mode", "affine") == "affine" and options.get("transpose", True)
        if not plain or codes.ndim != 2 or not self._settle([x, codes, scales, biases]):
            return original(*args, **options)
        found = _exactly(original, *args, **options)
        if self.dry:
            return found
        try:
            run = quantized_matmul(
                self.emulator,
                x,
                codes,
                scales,
                biases,
                group=options.get("group_size") or 64,
                bits=options.get("bits") or 4,
                gpu=self.gpu,
            )
        except ShippedKernelFault:
            # Of a row count that is no multiple of 8, MLX stores some results twice, from two
            # simdgroups: the same values, but a race here.
            return self._least("quantized_matmul", [x, codes, scales, biases], found)
        return self._keep(run, found)

    def _attention(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        mask, sinks = options.get("mask"), options.get("sinks")
        used = [*args, *(array for array in (mask, sinks) if isinstance(array, mx.array))]
        if not self._settle(used):
            return original(*args, **options)
        if self.dry:
            return original(*args, **options)
        try:
            run = attention(
                self.emulator,
                *args,
                scale=options["scale"],
                mask=mask,
                sinks=sinks,
                gpu=self.gpu,
            )
        except NoSuchKernel:
            return original(*args, **options)
        return self._keep(run, _exactly(original, *args, **options))

    def _keep(self, run: MlxRun, found: mx.array) -> mx.array:
        mx.eval(found)
        truth = np.array(found.astype(mx.float32))
        error = np.abs(np.array(run.output.astype(mx.float32)) - truth).max()
        if not error <= _AGREEMENT * np.abs(truth).max():
            raise LocalLLMError(
                f"{run.kernels} differs from MLX's op by {error:.3g}",
                hint="this MLX may call its kernel otherwise than MLX 0.32 did",
            )
        moved = run.moved - run.least_bytes
        self.add(run.kernels, moved)
        if run.least_bytes:
            self.cost.steps.append(Step("sum of the parts", run.least_bytes, measured=False))
        return found

    # -- ops without

    def _once(self, name: str) -> Callable[..., Any]:
        """An op that is one kernel on Metal: arrays in, arrays out, each once."""

        def counted(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
            used = [array for array in (*args, *options.values()) if isinstance(array, mx.array)]
            if not self._settle(used):
                return original(*args, **options)
            return self._least(name, used, original(*args, **options))

        return counted

    def _least(self, name: str, used: Sequence[mx.array | None], found: Any) -> Any:
        """Each input and each output once."""
        outputs = [found] if isinstance(found, mx.array) else list(found)
        mx.eval(outputs)
        moved = sum(array.nbytes for array in (*used, *outputs) if array is not None)
        self.cost.steps.append(Step(name, moved, measured=False))
        return found

    def _gather_mm(self, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Only the matrices that `rhs_indices` names are read."""
        a, b = args[:2]
        chosen = options.get("rhs_indices")
        if chosen is None or not self._settle([a, b, chosen]):
            return original(*args, **options)
        # On the CPU it takes float32 only.
        found = original(a.astype(mx.float32), b.astype(mx.float32), *args[2:], **options)
        found = found.astype(a.dtype)
        mx.eval(found)
        matrix = b.nbytes // int(np.prod(b.shape[:-2]))
        distinct = len(np.unique(np.array(chosen)))
        moved = a.nbytes + distinct * matrix + chosen.nbytes + found.nbytes
        self.cost.steps.append(Step("gather_mm", moved, measured=False))
        return found

    def _settle(self, arrays: Sequence[mx.array | None]) -> bool:
        """Counts and computes what leads to `arrays`; False while MLX traces a compiled graph."""
        present = [array for array in arrays if array is not None]
        try:
            self.walk(present)
            mx.eval(present)
        except (ValueError, RuntimeError) as error:
            if "eval" in str(error) or "trac" in str(error):
                return False
            raise
        return True

    def walk(self, outputs: list[mx.array]) -> None:
        """Counts every primitive that is still to be computed for `outputs`."""
        nodes: list[dict[str, Any]] = []
        mx.export_function(nodes.append, lambda: list(outputs))
        readable: dict[str, int] = {}
        for node in nodes:
            if node["type"] != "primitive":
                continue
            inputs = {
                name: min(_bytes(shape, dtype), readable.get(name, _bytes(shape, dtype)))
                for name, shape, dtype in node["inputs"]
            }
            made = {name: _bytes(shape, dtype) for name, shape, dtype in node["outputs"]}
            if node["name"] in _VIEWS:
                source = next(iter(inputs.values()), 0)
                readable |= {name: min(size, source) for name, size in made.items()}
                continue
            if node["name"] in _PICKERS:
                first = next(iter(inputs))
                inputs[first] = min(inputs[first], sum(made.values()))
            moved = sum(inputs.values()) + sum(made.values())
            self.cost.steps.append(Step(node["name"], moved, measured=False))


def _exactly(original: Callable[..., Any], *args: Any, **options: Any) -> mx.array:
    """The op in float32, rounded once: on the CPU, MLX sums half precision in half precision."""

    def wide(value: Any) -> Any:
        floating = isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
        return value.astype(mx.float32) if floating else value

    named = {name: wide(value) for name, value in options.items()}
    found: mx.array = original(*map(wide, args), **named)
    return found.astype(args[0].dtype)


def _bound(wrapped: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        return wrapped(original, *args, **options)

    return called


def _bytes(shape: tuple[int, ...], dtype: mx.Dtype) -> int:
    return int(np.prod(shape)) * dtype.size
