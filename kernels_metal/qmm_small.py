"""1 to 8 rows times a matrix in affine codes: one 8x8 tile, so that weights are read once.

Metal's matrix unit multiplies 8 rows in the time of one; decoding a few positions of several
sequences, or verifying drafted tokens, fills it. Each column of the tile is a row of x, and a
column depends on no other, so a row gives the same bits whatever stands beside it and however
many, one row alone included. (They are not the bits of `qmv`: Metal does not state in which order
its matrix unit adds.) Sums are float32 of float32 products; weights are decoded to float32, not
rounded to the dtype of x.

A lane's two elements of a tile are where MLX's own kernels take them to be (steel, BaseMMAFrag).
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from localllm.kernels_metal import affine
from localllm.kernels_metal.affine import Activation, Affine
from localllm.kernels_metal.affine_contests import contest_for, contests_for
from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.kernel import Launch, MetalKernel

MAX_ROWS = 8
_COLUMNS_OF_A_THREADGROUP = 32  # of y; half of them when gated
_THREADS = 256

_kernel = MetalKernel("qmm_small", affine.INPUTS, ["y"])


def qmm_small(
    x: mx.array, weight: Affine, *, bias: mx.array | None = None, residual: mx.array | None = None
) -> mx.array:
    """x W^T + bias + residual, rounded once: x [M, K] T -> [M, N] T, M from 1 to 8.

    T is float16, bfloat16 or float32, that of the scales too. bias: T [N]. residual: T [M, N].
    Raises ValueError where shapes or dtypes do not fit.
    """
    n = weight.shape[0]
    _check_rows(x)
    affine.check(x, weight, bias=(bias, (n,)), residual=(residual, (x.shape[0], n)))
    return _launch(x, weight, weight, bias, bias, residual, None)


def qmm_small_gated(
    x: mx.array,
    gate: Affine,
    up: Affine,
    activation: Activation,
    *,
    gate_bias: mx.array | None = None,
    up_bias: mx.array | None = None,
) -> mx.array:
    """activation(x G^T + gate_bias) * (x U^T + up_bias), rounded once: [M, K] T -> [M, N] T.

    M from 1 to 8. Both biases, T [N], or none. Raises ValueError where shapes or dtypes do not
    fit.
    """
    _check_rows(x)
    affine.check_gated(x, gate, up, gate_bias, up_bias)
    return _launch(x, gate, up, gate_bias, up_bias, None, activation)


def _check_rows(x: mx.array) -> None:
    if not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(f"x is {list(x.shape)}: qmm_small takes 1 to {MAX_ROWS} rows")


def _launch(
    x: mx.array,
    weight: Affine,
    up: Affine,
    bias: mx.array | None,
    up_bias: mx.array | None,
    residual: mx.array | None,
    activation: Activation | None,
) -> mx.array:
    rows, n = x.shape[0], weight.shape[0]
    columns = _COLUMNS_OF_A_THREADGROUP // (1 if activation is None else 2)
    launch = Launch(
        inputs=affine.inputs(x, weight, up, bias, up_bias, residual),
        grid=(_THREADS * -(-n // columns), 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(rows, n)],
        output_dtypes=[x.dtype],
        template=affine.template(x, weight, bias, residual, activation),
    )
    return _kernel(launch)[0]


def contests(dtype: mx.Dtype) -> Iterator[Contest]:
    """2, 4, 6 and 8 rows, at shapes of known models."""
    return contests_for("qmm_small", dtype, (2, 4, 6, 8), qmm_small, qmm_small_gated)


def contest(
    kind: str, rows: int, k: int, n: int, bits: int, group: int, dtype: mx.Dtype
) -> Contest:
    """kind: "linear" or "gated"."""
    return contest_for(
        "qmm_small", kind, qmm_small, qmm_small_gated, rows, k, n, bits, group, dtype
    )
