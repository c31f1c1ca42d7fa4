"""RMSNorm of rows, alone or fused with the addition to the residual stream before it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.kernel import Launch, MetalKernel, Size, Template
from localllm.kernels_metal.reference import rms_norm as reference

LONGEST_ROW = 16384

_NORM = MetalKernel("rms_norm", ["x", "weight", "settings"], ["normed"])
_ADD_NORM = MetalKernel("add_rms_norm", ["x", "residual", "weight", "settings"], ["sum", "normed"])


def rms_norm(x: mx.array, weight: mx.array, eps: float, *, offset: float = 0.0) -> mx.array:
    """x * rsqrt(mean(x^2) + eps) * (weight + offset) for each row, summed in float32.

    x: [n, d], half, bfloat16 or float32, d <= 16384. weight: [d], float32 or x's dtype. offset: 1
    for Gemma. Returns [n, d] in x's dtype. Raises ValueError for other shapes and dtypes.
    """
    _check(x, weight)
    template, threads = _width(x, weight)
    (normed,) = _NORM(
        Launch(
            inputs=[x, weight, _settings(eps, offset, 1.0)],
            grid=(threads[0], x.shape[0], 1),
            threadgroup=threads,
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
            template=template,
        )
    )
    return normed


def add_rms_norm(
    x: mx.array,
    residual: mx.array,
    weight: mx.array,
    eps: float,
    *,
    offset: float = 0.0,
    scale: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """(sum, normed): sum = residual + x * scale, and that sum normalized as by `rms_norm`.

    x, residual: [n, d] of one dtype, half, bfloat16 or float32, d <= 16384. scale: Granite's
    residual multiplier. Both results: [n, d] in that dtype; the sum is rounded to it once, and
    what is normalized is the rounded sum. Raises ValueError for other shapes and dtypes.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"the residual is {residual.dtype} {residual.shape}, x is {x.dtype} {x.shape}"
        )
    template, threads = _width(x, weight)
    total, normed = _ADD_NORM(
        Launch(
            inputs=[x, residual, weight, _settings(eps, offset, scale)],
            grid=(threads[0], x.shape[0], 1),
            threadgroup=threads,
            output_shapes=[x.shape, x.shape],
            output_dtypes=[x.dtype, x.dtype],
            template=template,
        )
    )
    return total, normed


def _check(x: mx.array, weight: mx.array) -> None:
    if x.ndim != 2 or not 0 < x.shape[1] <= LONGEST_ROW or x.shape[0] == 0:
        raise ValueError(f"rows [n, d] with d up to {LONGEST_ROW} are needed, not {x.shape}")
    if x.dtype not in (mx.float16, mx.bfloat16, mx.float32):
        raise ValueError(f"half, bfloat16 or float32 is needed, not {x.dtype}")
    if weight.shape != (x.shape[1],) or weight.dtype not in (mx.float32, x.dtype):
        raise ValueError(
            f"a weight [{x.shape[1]}] of float32 or {x.dtype} is needed, "
            f"not {weight.dtype} {weight.shape}"
        )


def _width(x: mx.array, weight: mx.array) -> tuple[Template, Size]:
    """Quads a thread holds, and threads a row: as few quads as 1024 threads allow."""
    row = -(-x.shape[1] // 4)
    quads = next(quads for quads in (1, 2, 4) if row <= 1024 * quads)
    threads = -(-row // (32 * quads)) * 32
    return (("T", x.dtype), ("QUADS", quads)), (threads, 1, 1)


@lru_cache(maxsize=64)
def _settings(eps: float, offset: float, scale: float) -> mx.array:
    return mx.array([eps, offset, scale], dtype=mx.float32)


def contests(dtype: mx.Dtype) -> Iterator[Contest]:
    """A decode step of one row and of eight, and a prefill chunk, at common widths."""
    for rows, d in ((1, 576), (1, 4096), (8, 4096), (256, 2048), (1, 8192)):
        yield contest(rows, d, dtype)


def work(rows: int, d: int, dtype: mx.Dtype) -> str:
    """The entry of the dispatch table."""
    return f"{rows} x {d}, {str(dtype).removeprefix('mlx.core.')}"


def contest(rows: int, d: int, dtype: mx.Dtype) -> Contest:
    """`add_rms_norm` on random rows."""
    random = np.random.default_rng(d + rows)
    x, residual = (
        mx.array(random.standard_normal((rows, d), np.float32)).astype(dtype) for _ in range(2)
    )
    weight = mx.array(random.standard_normal(d, np.float32)).astype(dtype)
    return Contest(
        kernel="add_rms_norm",
        work=work(rows, d, dtype),
        ours=partial(_ours, x, residual, weight),
        mlx=partial(_mlx, x, residual, weight),
        truth=partial(_truth, x, residual, weight),
        tolerance=4.0 * mx.finfo(dtype).eps,
        least_bytes=(4 * rows * d + d) * dtype.size,
    )


def _ours(x: mx.array, residual: mx.array, weight: mx.array) -> list[mx.array]:
    return list(add_rms_norm(x, residual, weight, 1e-5))


def _mlx(x: mx.array, residual: mx.array, weight: mx.array) -> list[mx.array]:
    total = residual + x
    return [total, mx.fast.rms_norm(total, weight, 1e-5)]


def _truth(x: mx.array, residual: mx.array, weight: mx.array) -> list[np.ndarray]:
    wide = [np.array(a.astype(mx.float32)).astype(np.float64) for a in (x, residual, weight)]
    return list(reference.add_rms_norm(wide[0], wide[1], wide[2], 1e-5))
