"""The low-rank part of linear layers, where each row of a batch has an adapter of its own or none.

Two small kernels: `lora_shrink` makes h = x A^T in float32, `lora_expand` adds h B^T. What a row
gives depends on no other row; adapters that no row has are not read. Sums are float32, in an order
that depends on K and R alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.kernel import Launch, MetalKernel
from localllm.kernels_metal.reference import lora as reference

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
_RANKS_OF_A_THREADGROUP = 4
_THREADS = 128

_shrink = MetalKernel("lora_shrink", ["x", "a", "adapter"], ["h"])
_expand = MetalKernel("lora_expand", ["y", "h", "b", "adapter"], ["added"])


def lora(y: mx.array, x: mx.array, a: mx.array, b: mx.array, adapter: mx.array) -> mx.array:
    """y + (x A_i^T) B_i^T, row by row, with i = adapter[row]; a row of adapter -1 is y's own bits.

    y: T [n, N]. x: T [n, K]. a: T [slots, R, K]. b: T [slots, N, R], its scale already in it.
    adapter: int32 [n], each -1 or a slot. T: float16, bfloat16 or float32. K and R are multiples
    of 8; an adapter of a smaller rank has zeros in its last ranks. Returns T [n, N].
    Raises ValueError where shapes or dtypes do not fit; the values of `adapter` are not checked.
    """
    _check(y, x, a, b, adapter)
    (rows, n), rank = y.shape, a.shape[1]
    shrink = Launch(
        inputs=[x, a, adapter],
        grid=(_THREADS * (rank // _RANKS_OF_A_THREADGROUP), rows, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(rows, rank)],
        output_dtypes=[mx.float32],
        template=[("T", x.dtype)],
    )
    (h,) = _shrink(shrink)
    threads = n * _lanes(rank)
    expand = Launch(
        inputs=[y, h, b, adapter],
        grid=(_THREADS * -(-threads // _THREADS), rows, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(rows, n)],
        output_dtypes=[y.dtype],
        template=[("T", y.dtype)],
    )
    return _expand(expand)[0]


def _lanes(rank: int) -> int:
    """Lanes that share a column of y: as in `lora_expand`."""
    lanes = 1
    while lanes < 8 and lanes * 16 <= rank:
        lanes *= 2
    return lanes


def _check(y: mx.array, x: mx.array, a: mx.array, b: mx.array, adapter: mx.array) -> None:
    if y.ndim != 2 or x.ndim != 2 or a.ndim != 3 or b.ndim != 3:
        raise ValueError("y and x are matrices, a and b are stacks of matrices")
    (rows, n), (slots, rank, k) = y.shape, a.shape
    if x.shape != (rows, k) or b.shape != (slots, n, rank) or adapter.shape != (rows,):
        raise ValueError(
            f"y {list(y.shape)}, x {list(x.shape)}, a {list(a.shape)}, b {list(b.shape)} and "
            f"adapter {list(adapter.shape)} do not fit each other"
        )
    if k % 8 or rank % 8:
        raise ValueError(f"K and R must be multiples of 8, not {k} and {rank}")
    if {x.dtype, a.dtype, b.dtype} != {y.dtype} or y.dtype not in DTYPES:
        raise ValueError(f"y, x, a and b must have one dtype of {DTYPES}")
    if adapter.dtype != mx.int32:
        raise ValueError(f"adapter must be int32, not {adapter.dtype}")


class _Case(NamedTuple):
    y: mx.array
    x: mx.array
    a: mx.array
    b: mx.array
    adapter: mx.array


@lru_cache(maxsize=1)
def case(adapter: tuple[int, ...], slots: int, rank: int, k: int, n: int, dtype: mx.Dtype) -> _Case:
    """Random, with adapters that change y by about a tenth."""
    rng = np.random.default_rng(k + n + rank + len(adapter))

    def normal(*shape: int, size: float = 1.0) -> mx.array:
        return mx.array(size * rng.standard_normal(shape, np.float32)).astype(dtype)

    rows = len(adapter)
    a, b = normal(slots, rank, k, size=k**-0.5), normal(slots, n, rank, size=0.1 * rank**-0.5)
    return _Case(normal(rows, n), normal(rows, k), a, b, mx.array(adapter, mx.int32))


# Of the largest value: one rounding to the dtype (ours), or one at each op (MLX).
TOLERANCE = {mx.float16: 2e-3, mx.bfloat16: 1.6e-2, mx.float32: 1e-5}


def contests(dtype: mx.Dtype) -> Iterator[Contest]:
    """Batches of 1 and 8 rows over three adapters and none, against `mx.gather_mm`."""
    for rows in (1, 8):
        for rank in (16, 64):
            for k, n in ((576, 1536), (2048, 2048), (2048, 8192)):
                yield contest(rows, rank, k, n, dtype)


def contest(rows: int, rank: int, k: int, n: int, dtype: mx.Dtype) -> Contest:
    """Every fourth row has no adapter, the others one of three."""
    adapter = (1,) if rows == 1 else tuple((0, 1, 2, -1)[row % 4] for row in range(rows))
    return _contest(adapter, rank, k, n, dtype)


def _contest(adapter: tuple[int, ...], rank: int, k: int, n: int, dtype: mx.Dtype) -> Contest:
    def made() -> _Case:
        return case(adapter, 4, rank, k, n, dtype)

    used, rows = len(set(adapter) - {-1}), len(adapter)
    with_one = sum(slot >= 0 for slot in adapter)
    return Contest(
        kernel="lora",
        work=work(rows, rank, k, n, dtype),
        ours=lambda: [lora(*made())],
        mlx=lambda: [by_gather_mm(*made())],
        truth=lambda: [_truth(made())],
        tolerance=TOLERANCE[dtype],
        least_bytes=dtype.size * (used * rank * (k + n) + with_one * k + 2 * rows * n),
    )


def work(rows: int, rank: int, k: int, n: int, dtype: mx.Dtype) -> str:
    """The entry of the dispatch table."""
    name = str(dtype).removeprefix("mlx.core.")
    return f"rank {rank}, {rows} row{'s' if rows > 1 else ''}, {n} x {k}, {name}"


def by_gather_mm(y: mx.array, x: mx.array, a: mx.array, b: mx.array, adapter: mx.array) -> mx.array:
    """The same in MLX's own ops."""
    slot = mx.maximum(adapter, 0)
    h = mx.gather_mm(x[:, None], a.swapaxes(1, 2), rhs_indices=slot)
    added = mx.gather_mm(h, b.swapaxes(1, 2), rhs_indices=slot)[:, 0]
    return mx.where(adapter[:, None] >= 0, y + added, y)


def _truth(case: _Case) -> np.ndarray:
    y, x, a, b = (np.array(array.astype(mx.float32)) for array in case[:4])
    return reference.lora(y, x, a, b, np.array(case.adapter))
