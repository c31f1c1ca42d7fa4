"""Multiplying by affine codes against MLX's own ops, at the shapes of known models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from localllm.kernels_metal import affine
from localllm.kernels_metal.affine import Affine
from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.reference import qmv as reference

# [K, N] of one matrix: up of SmolLM2-135M, up and down of Llama-3.2-1B, up of SmolLM2-360M,
# k of Llama-3.1-8B.
SHAPES = ((576, 1536), (2048, 8192), (8192, 2048), (960, 2560), (4096, 1024))

# Of the largest value: rounding to the dtype once (ours) or at each op (MLX, when fused), and the
# float32 sums of K terms.
TOLERANCE = {mx.float16: 2e-3, mx.bfloat16: 1.6e-2, mx.float32: 1e-5}


class Case(NamedTuple):
    """One row's worth of work: x [M, K], gate and up [N, K], the rest to be added."""

    x: mx.array
    gate: Affine
    up: Affine
    bias: mx.array  # [N]
    up_bias: mx.array  # [N]
    residual: mx.array  # [M, N]


@lru_cache(maxsize=1)
def case(rows: int, k: int, n: int, bits: int, group: int, dtype: mx.Dtype) -> Case:
    """Random, of the sizes that activations and weights have."""
    rng = np.random.default_rng(rows * k + n + bits)

    def normal(*shape: int, size: float = 1.0) -> mx.array:
        return mx.array(size * rng.standard_normal(shape, np.float32)).astype(dtype)

    gate, up = (
        affine.quantized(normal(n, k, size=k**-0.5), bits=bits, group=group) for _ in range(2)
    )
    return Case(normal(rows, k), gate, up, normal(n), normal(n), normal(rows, n))


def work(kind: str, rows: int, k: int, n: int, bits: int, group: int, dtype: mx.Dtype) -> str:
    """The entry of the dispatch table. kind: linear, linear + residual, or gated."""
    name = str(dtype).removeprefix("mlx.core.")
    counted = f"{rows} row{'s' if rows > 1 else ''}"
    return f"{kind}, {counted}, {n} x {k}, {bits}-bit by {group}, {name}"


def contests_for(
    kernel: str,
    dtype: mx.Dtype,
    rows_at: tuple[int, ...],
    linear: Callable[..., mx.array],
    gated: Callable[..., mx.array],
) -> Iterator[Contest]:
    """`linear`, plain and with a residual, and `gated` with silu, at 4 and 8 bits."""
    for bits, group in ((4, 64), (8, 64)):
        for rows in rows_at:
            for k, n in SHAPES:
                of = _Contests(kernel, linear, gated, rows, k, n, bits, group, dtype)
                yield from (of.plain(), of.with_residual(), of.gated_silu())


def contest_for(
    kernel: str,
    kind: str,
    linear: Callable[..., mx.array],
    gated: Callable[..., mx.array],
    rows: int,
    k: int,
    n: int,
    bits: int,
    group: int,
    dtype: mx.Dtype,
) -> Contest:
    """kind: "linear" or "gated", see `work`."""
    of = _Contests(kernel, linear, gated, rows, k, n, bits, group, dtype)
    return of.gated_silu() if kind == "gated" else of.plain()


class _Contests(NamedTuple):
    kernel: str
    linear: Callable[..., mx.array]
    gated: Callable[..., mx.array]
    rows: int
    k: int
    n: int
    bits: int
    group: int
    dtype: mx.Dtype

    def plain(self) -> Contest:
        return self._contest(
            "linear",
            lambda c: self.linear(c.x, c.gate),
            lambda c: _quantized_matmul(c.x, c.gate),
            lambda c: reference.matmul(_f64(c.x), _weight(c.gate)),
        )

    def with_residual(self) -> Contest:
        return self._contest(
            "linear + residual",
            lambda c: self.linear(c.x, c.gate, residual=c.residual),
            lambda c: c.residual + _quantized_matmul(c.x, c.gate),
            lambda c: reference.matmul(_f64(c.x), _weight(c.gate), residual=_f64(c.residual)),
            added=self.rows * self.n,
        )

    def gated_silu(self) -> Contest:
        def mlx(c: Case) -> mx.array:
            gate = _quantized_matmul(c.x, c.gate)
            return gate * mx.sigmoid(gate) * _quantized_matmul(c.x, c.up)

        return self._contest(
            "gated",
            lambda c: self.gated(c.x, c.gate, c.up, "silu"),
            mlx,
            lambda c: reference.gated(_f64(c.x), _weight(c.gate), _weight(c.up), "silu"),
            matrices=2,
        )

    def _contest(
        self,
        kind: str,
        ours: Callable[[Case], mx.array],
        mlx: Callable[[Case], mx.array],
        truth: Callable[[Case], np.ndarray],
        *,
        added: int = 0,
        matrices: int = 1,
    ) -> Contest:
        """added: values read besides x and weights."""
        rows, k, n, bits, group, dtype = self[3:]

        def made() -> Case:
            return case(rows, k, n, bits, group, dtype)

        least = affine.least_bytes(rows, (n, k), bits, group, dtype, matrices)
        return Contest(
            kernel=self.kernel,
            work=work(kind, rows, k, n, bits, group, dtype),
            ours=lambda: [ours(made())],
            mlx=lambda: [mlx(made())],
            truth=lambda: [truth(made())],
            tolerance=TOLERANCE[dtype],
            least_bytes=least + added * dtype.size,
        )


def _quantized_matmul(x: mx.array, weight: Affine) -> mx.array:
    return mx.quantized_matmul(x, *weight[:3], group_size=weight.group, bits=weight.bits)


def _f64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _weight(weight: Affine) -> np.ndarray:
    codes = np.array(weight.codes)
    scales, biases = _f64(weight.scales), _f64(weight.biases)
    return reference.dequantized(codes, scales, biases, weight.bits, weight.group)
