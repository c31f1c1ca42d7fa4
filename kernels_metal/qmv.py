"""One row times a matrix in affine codes, with what surrounds it in a decoder fused in.

Every weight, scale and bias is read once, 16 bytes of codes at a time. Sums are float32, in an
order that depends on K alone. It is not the order of `qmm_small`, whose sums are made inside the
matrix unit in an order that Metal does not state: whoever needs one row to give the same bits
alone and beside others calls `qmm_small` for the single row too, at the same bytes read.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from localllm.kernels_metal import affine
from localllm.kernels_metal.affine import Activation, Affine
from localllm.kernels_metal.affine_contests import contest_for, contests_for
from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.kernel import Launch, MetalKernel

_ROWS_OF_A_THREADGROUP = 16  # of y; half of them when gated
_THREADS = 64

_kernel = MetalKernel("qmv", affine.INPUTS, ["y"])


def qmv(
    x: mx.array, weight: Affine, *, bias: mx.array | None = None, residual: mx.array | None = None
) -> mx.array:
    """x W^T + bias + residual, rounded once: x [1, K] T -> [1, N] T.

    T is float16, bfloat16 or float32, that of the scales too. bias: T [N]. residual: T [1, N].
    Raises ValueError where shapes or dtypes do not fit.
    """
    n = weight.shape[0]
    _check_one_row(x)
    affine.check(x, weight, bias=(bias, (n,)), residual=(residual, (1, n)))
    return _launch(x, weight, weight, bias, bias, residual, None)


def qmv_gated(
    x: mx.array,
    gate: Affine,
    up: Affine,
    activation: Activation,
    *,
    gate_bias: mx.array | None = None,
    up_bias: mx.array | None = None,
) -> mx.array:
    """activation(x G^T + gate_bias) * (x U^T + up_bias), rounded once: x [1, K] T -> [1, N] T.

    Both biases, T [N], or none. Raises ValueError where shapes or dtypes do not fit.
    """
    _check_one_row(x)
    affine.check_gated(x, gate, up, gate_bias, up_bias)
    return _launch(x, gate, up, gate_bias, up_bias, None, activation)


def _check_one_row(x: mx.array) -> None:
    if x.shape[0] != 1:
        raise ValueError(f"x is {list(x.shape)}: qmv takes one row; qmm_small takes up to 8")


def _launch(
    x: mx.array,
    weight: Affine,
    up: Affine,
    bias: mx.array | None,
    up_bias: mx.array | None,
    residual: mx.array | None,
    activation: Activation | None,
) -> mx.array:
    n = weight.shape[0]
    rows = _ROWS_OF_A_THREADGROUP // (1 if activation is None else 2)
    launch = Launch(
        inputs=affine.inputs(x, weight, up, bias, up_bias, residual),
        grid=(_THREADS * -(-n // rows), 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(1, n)],
        output_dtypes=[x.dtype],
        template=affine.template(x, weight, bias, residual, activation),
    )
    return _kernel(launch)[0]


def contests(dtype: mx.Dtype) -> Iterator[Contest]:
    """One row, plain and with everything that may be fused, at shapes of known models."""
    return contests_for("qmv", dtype, (1,), qmv, qmv_gated)


def contest(
    kind: str, rows: int, k: int, n: int, bits: int, group: int, dtype: mx.Dtype
) -> Contest:
    """kind: "linear" or "gated"."""
    return contest_for("qmv", kind, qmv, qmv_gated, rows, k, n, bits, group, dtype)
