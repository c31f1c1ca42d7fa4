"""The emulator against kernels that it was not made for: those that ship inside the MLX wheel.

They run on Apple GPUs every day, so they are right; where they come out wrong here, the emulator
is. Each is compared with NumPy in float64 on the same (already rounded) inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from localllm.errors import LocalLLMError
from localllm.kernels_metal.emulator.arrays import TYPE_NAMES
from localllm.kernels_metal.emulator.emulator import Emulator
from localllm.kernels_metal.emulator.mlx_attention import attention
from localllm.kernels_metal.emulator.mlx_kernels import MlxRun, softmax
from localllm.kernels_metal.emulator.mlx_matmul import quantized_matmul
from localllm.kernels_metal.emulator.mlx_sources import ShippedSourceMissing

# Half of the last bit, relative: what rounding one value to the type costs at most.
_ROUNDING = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}


@dataclass(frozen=True)
class Outcome:
    """One kernel on one shape. error: the largest difference, relative to the truth's largest
    value; None where the kernel did not run, and `problem` says why. missing: this MLX does not
    ship it, which says nothing about the emulator."""

    kernel: str
    work: str
    error: float | None
    tolerance: float
    problem: str | None = None
    missing: bool = False

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.tolerance


@dataclass(frozen=True)
class Case:
    """roundings: how many times the kernel rounds to its type on the way to a result."""

    kernel: str
    work: str
    dtype: mx.Dtype
    run: Callable[[Emulator], tuple[MlxRun, np.ndarray]]
    roundings: int = 2

    @property
    def tolerance(self) -> float:
        """Float32 accumulation over up to 1024 terms adds 2**-17 in the worst case."""
        return self.roundings * _ROUNDING[self.dtype] + 2.0**-17


def self_check(emulator: Emulator, cases: list[Case] | None = None) -> Iterator[Outcome]:
    """Runs each case; a fault is an outcome, not an exception."""
    for case in all_cases() if cases is None else cases:
        yield check(emulator, case)


def check(emulator: Emulator, case: Case) -> Outcome:
    try:
        run, truth = case.run(emulator)
    except LocalLLMError as raised:
        missing = isinstance(raised, ShippedSourceMissing)
        return Outcome(case.kernel, case.work, None, case.tolerance, str(raised), missing)
    kernels = {dispatched.kernel for dispatched in run.runs}
    if case.kernel not in kernels:
        problem = f"{run.kernels} ran instead"
        return Outcome(case.kernel, case.work, None, case.tolerance, problem)
    found = np.array(run.output.astype(mx.float32), np.float64)
    largest = np.abs(truth).max()
    # A NaN is an error of infinity, which no tolerance covers.
    error = float(np.nan_to_num(np.abs(found - truth), nan=np.inf).max() / largest)
    return Outcome(case.kernel, case.work, error, case.tolerance)


def all_cases() -> list[Case]:
    """Every kernel in half, the ones that differ most by type in all three."""
    cases = []
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        cases.append(_matmul_case("affine_qmv_fast", dtype, m=1, k=1024, n=48))
        cases.append(_attention_case("attention", dtype, heads=3, kv_heads=1, rows=45, n=45, d=64))
    half = mx.float16
    cases += [
        _matmul_case("affine_qmv", half, m=1, k=576, n=40),
        _matmul_case("affine_qmv_fast", half, m=1, k=512, n=40, bits=8, group=32),
        _matmul_case("affine_qmv_quad", half, m=2, k=64, n=72),
        _matmul_case("affine_qmv_wide", half, m=4, k=512, n=72),
        _matmul_case("affine_qmv_wide", half, m=8, k=512, n=72),
        _matmul_case("affine_qmm_t", half, m=20, k=512, n=64, forced=True),
        _matmul_case("affine_qmm_t_splitk", half, m=20, k=512, n=64),
        _attention_case("sdpa_vector", half, heads=9, kv_heads=3, rows=1, n=200, d=64),
        _attention_case("sdpa_vector", half, heads=4, kv_heads=2, rows=3, n=70, d=128),
        _attention_case("sdpa_vector_2pass_1", half, heads=8, kv_heads=2, rows=1, n=300, d=64),
        _attention_case("attention", half, heads=2, kv_heads=1, rows=40, n=70, d=128),
        _softmax_case(half, rows=3, n=200),
    ]
    return cases


def _matmul_case(
    kernel: str,
    dtype: mx.Dtype,
    *,
    m: int,
    k: int,
    n: int,
    bits: int = 4,
    group: int = 64,
    forced: bool = False,
) -> Case:
    def run(emulator: Emulator) -> tuple[MlxRun, np.ndarray]:
        random = np.random.default_rng(1)
        weight = mx.array(random.standard_normal((n, k)), mx.float32)
        codes, scales, biases = mx.quantize(weight, group, bits)
        scales, biases = scales.astype(dtype), biases.astype(dtype)
        x = mx.array(random.standard_normal((m, k)), mx.float32).astype(dtype)
        exact = mx.dequantize(
            codes, scales.astype(mx.float32), biases.astype(mx.float32), group, bits
        )
        truth = np.array(x.astype(mx.float32), np.float64) @ np.array(exact, np.float64).T
        found = quantized_matmul(
            emulator,
            x,
            codes,
            scales,
            biases,
            group=group,
            bits=bits,
            kernel=kernel if forced else None,
        )
        return found, truth

    work = f"{TYPE_NAMES[dtype]}, {bits} bit, groups of {group}, {m} x {k} by {n} x {k}"
    return Case(kernel, work, dtype, run)


def _attention_case(
    kernel: str, dtype: mx.Dtype, *, heads: int, kv_heads: int, rows: int, n: int, d: int
) -> Case:
    causal = rows > 1

    def run(emulator: Emulator) -> tuple[MlxRun, np.ndarray]:
        random = np.random.default_rng(2)
        q, k, v = (
            mx.array(random.standard_normal((1, h, length, d)), mx.float32).astype(dtype)
            for h, length in ((heads, rows), (kv_heads, n), (kv_heads, n))
        )
        found = attention(
            emulator,
            q,
            k,
            v,
            scale=d**-0.5,
            mask="causal" if causal else None,
            kernel="sdpa_vector_2pass" if "2pass" in kernel else None,
        )
        return found, _attention_truth(q, k, v, d**-0.5, causal)

    work = f"{TYPE_NAMES[dtype]}, {rows} rows of {heads} heads on {kv_heads}, {n} positions, {d}"
    return Case(kernel, work, dtype, run)


def _attention_truth(
    q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool
) -> np.ndarray:
    """[b, heads, rows, d] in float64."""
    queries, keys, values = (np.array(a.astype(mx.float32), np.float64) for a in (q, k, v))
    shared = queries.shape[1] // keys.shape[1]
    keys, values = np.repeat(keys, shared, axis=1), np.repeat(values, shared, axis=1)
    scores = np.einsum("bhqd,bhkd->bhqk", queries, keys) * scale
    if causal:
        rows, n = scores.shape[2:]
        hidden = np.arange(n)[None, :] > np.arange(rows)[:, None] + n - rows
        scores = np.where(hidden, -np.inf, scores)
    weights = _softmax(scores)
    found: np.ndarray = np.einsum("bhqk,bhkd->bhqd", weights, values)
    return found


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    found: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return found


def _softmax_case(dtype: mx.Dtype, *, rows: int, n: int) -> Case:
    def run(emulator: Emulator) -> tuple[MlxRun, np.ndarray]:
        random = np.random.default_rng(3)
        x = mx.array(random.standard_normal((rows, n)), mx.float32).astype(dtype)
        return softmax(emulator, x), _softmax(np.array(x.astype(mx.float32), np.float64))

    return Case("softmax_single_row", f"{TYPE_NAMES[dtype]}, {rows} rows of {n}", dtype, run)


def as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "kernel": outcome.kernel,
        "work": outcome.work,
        "error": outcome.error,
        "tolerance": outcome.tolerance,
        "passed": outcome.passed,
        "problem": outcome.problem,
    }
