"""Matrices of the reference backend: dense or quantized, and the linear layers over them.

A matrix keeps the size it has in the file, so loading takes no more than the file; it becomes
float32 slab by slab when it is used. All results are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from localllm.backend.weights import file_map
from localllm.checkpoint.tensor import Affine, Dense, GroupValues, Tensor

_MLX_GROUPS = (32, 64, 128)
_MLX_BITS = (2, 3, 4, 5, 6, 8)
SLAB = 1 << 22  # weights made float32 at a time: 16 MB
_HUGE = 1 << 26  # bytes of codes from which a matrix stays in numpy
_FLOAT = {np.dtype(np.float32): mx.float32, np.dtype(np.float16): mx.float16}


class Part(Module):
    """A module in MLX's sense (parameters by name, for training), with a typed constructor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]


class DenseMatrix(Part):
    """[out, in], stored transposed as [in, out]: MLX's CPU matmul is 2.4 times faster so."""

    def __init__(self, weight: Dense) -> None:
        super().__init__()
        self.weight = _transposed(weight)

    @property
    def shape(self) -> tuple[int, int]:
        inner, out = self.weight.shape
        return out, inner

    def matmul(self, x: mx.array) -> mx.array:
        """float32 [n, in] -> [n, out]."""
        if self.weight.dtype == mx.float32:
            return x @ self.weight
        return _by_slabs(self.shape, lambda slab: x @ self.weight[:, slab].astype(mx.float32))

    def rows(self, index: mx.array) -> mx.array:
        """The rows of [out, in] at `index` [n]: float32 [n, in]."""
        return mx.take(self.weight, index, axis=1).astype(mx.float32).T

    def slab(self, rows: slice) -> mx.array:
        """A run of rows: float32 [rows, in]."""
        return self.weight[:, rows].astype(mx.float32).T


class AffineMatrix(Part):
    """[out, in] in codes by groups, for groups of 16 and of MLX's own sizes.

    Few rows go through `quantized_matmul`; for many, a slab is dequantized once and multiplied
    as a dense matrix, which MLX does faster on the CPU. Both agree to float32 rounding.
    """

    def __init__(self, weight: Affine) -> None:
        super().__init__()
        self.codes = _codes(weight.codes)
        self.scales = _GroupArray(weight.scales)
        self.biases = None if weight.biases is None else _GroupArray(weight.biases)
        self.bits, self.group, self.zero_point = weight.bits, weight.group, weight.zero_point
        self._shape = (weight.shape[-2], weight.shape[-1])
        # Measured crossing points: MLX unpacks odd widths several times slower than 2, 4 and 8.
        self._few = 5 if weight.bits in (2, 4, 8) else 20
        self.freeze()

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def matmul(self, x: mx.array) -> mx.array:
        """float32 [n, in] -> [n, out]."""
        return _by_slabs(self.shape, lambda slab: self._slab_matmul(x, slab))

    def _slab_matmul(self, x: mx.array, slab: slice) -> mx.array:
        if x.shape[0] <= self._few:
            return self._quantized_matmul(x, slab)
        return x @ mx.contiguous(self._dequantized(slab).T)

    def rows(self, index: mx.array) -> mx.array:
        """The rows of [out, in] at `index` [n], and no others, dequantized: float32 [n, in]."""
        return self._dequantized(index)

    def slab(self, rows: slice) -> mx.array:
        """A run of rows: float32 [rows, in]."""
        return self._dequantized(rows)

    def _codes_of(self, rows: mx.array | slice) -> mx.array:
        """uint32 [rows, words]."""
        if isinstance(self.codes, mx.array):
            return self.codes[rows]
        return mx.array(self.codes[rows if isinstance(rows, slice) else np.array(rows)])

    def _affine(self, rows: mx.array | slice) -> tuple[mx.array, mx.array]:
        """Scales and biases, float32 [rows, groups], so that w = scale * code + bias."""
        scales = self.scales.expand(rows)
        biases = scales * -self.zero_point
        return scales, biases if self.biases is None else biases + self.biases.expand(rows)

    def _quantized_matmul(self, x: mx.array, rows: slice) -> mx.array:
        codes = self._codes_of(rows)
        scales, biases = self._affine(rows)
        if self.group != 16:
            return mx.quantized_matmul(
                x, codes, scales, biases, group_size=self.group, bits=self.bits
            )
        # MLX has no groups of 16: take the even ones and the odd ones as groups of 32, each
        # against an input in which the other half is zero.
        halves = x.reshape(x.shape[0], -1, 2, 16)  # [n, in / 32, half, 16]
        zero = mx.zeros_like(halves[:, :, 0])
        inputs = [
            mx.stack([halves[:, :, 0], zero], axis=2).reshape(x.shape),
            mx.stack([zero, halves[:, :, 1]], axis=2).reshape(x.shape),
        ]
        even, odd = (
            mx.quantized_matmul(
                inputs[half],
                codes,
                mx.contiguous(scales[:, half::2]),
                mx.contiguous(biases[:, half::2]),
                group_size=32,
                bits=self.bits,
            )
            for half in (0, 1)
        )
        return even + odd

    def _dequantized(self, rows: mx.array | slice) -> mx.array:
        """float32 [rows, in]."""
        codes = self._codes_of(rows)
        scales, biases = self._affine(rows)
        if self.group != 16:
            return mx.dequantize(codes, scales, biases, group_size=self.group, bits=self.bits)
        count, inner = codes.shape[0], self.shape[1]
        ones = mx.ones((count, inner // 32))
        plain = mx.dequantize(codes, ones, mx.zeros_like(ones), group_size=32, bits=self.bits)
        groups = plain.reshape(count, -1, 16)  # [rows, in / 16, 16]
        return (groups * scales[..., None] + biases[..., None]).reshape(count, inner)


class _GroupArray(Part):
    """`GroupValues` on MLX, two levels kept apart until used."""

    def __init__(self, values: GroupValues) -> None:
        super().__init__()
        self.base = mx.array(values.values)
        self.multiplier = None if values.multiplier is None else mx.array(values.multiplier)

    def expand(self, rows: mx.array | slice) -> mx.array:
        """float32 [rows, groups]."""
        base = self.base[rows].astype(mx.float32)
        if self.multiplier is None:
            return base
        multiplier = self.multiplier[rows].astype(mx.float32)
        per = multiplier.shape[-1] // base.shape[-1]
        return mx.repeat(base, per, axis=-1) * multiplier


class Matrix(Protocol):
    """What a linear layer or an embedding stands on: [out, in], of whatever kind."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def matmul(self, x: mx.array) -> mx.array: ...

    def rows(self, index: mx.array) -> mx.array: ...

    def slab(self, rows: slice) -> mx.array: ...


class Linear(Part):
    """x -> x W^T + b, over a matrix of either kind."""

    def __init__(self, matrix: Matrix, bias: mx.array | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        """float32 [n, in] -> [n, out]."""
        y = self.matrix.matmul(x)
        return y if self.bias is None else y + self.bias


def to_matrix(weight: Tensor) -> Matrix:
    """A [out, in] tensor as a matrix. Group sizes and widths that MLX cannot take become dense."""
    if isinstance(weight, Dense):
        return DenseMatrix(weight)
    inner = weight.shape[-1]
    fits = weight.group in _MLX_GROUPS or (weight.group == 16 and inner % 32 == 0)
    if not fits or inner % weight.group or weight.bits not in _MLX_BITS:
        return DenseMatrix(Dense(weight.to_float32(), "float32"))
    return AffineMatrix(weight)


def to_matrices(weight: Tensor) -> list[Matrix]:
    """A stack of experts [E, out, in] as E matrices."""
    return [to_matrix(_expert(weight, index)) for index in range(weight.shape[0])]


def to_vector(weight: Tensor) -> mx.array:
    """A gain or bias: float32 [n]."""
    return mx.array(weight.to_float32())


def _expert(weight: Tensor, index: int) -> Tensor:
    if isinstance(weight, Dense):
        return replace(weight, data=weight.data[index])

    def pick(values: GroupValues) -> GroupValues:
        multiplier = None if values.multiplier is None else values.multiplier[index]
        return GroupValues(values.values[index], multiplier)

    return replace(
        weight,
        codes=weight.codes[index],
        scales=pick(weight.scales),
        biases=None if weight.biases is None else pick(weight.biases),
    )


def _transposed(weight: Dense) -> mx.array:
    """[in, out] in the file's dtype, written in place: no second copy while loading."""
    out, inner = weight.shape
    bfloat16 = weight.dtype == "bfloat16"
    result = mx.zeros((inner, out), mx.uint16 if bfloat16 else _FLOAT[weight.data.dtype])
    mx.eval(result)
    view: np.ndarray[Any, Any] = np.array(result, copy=False)
    view[...] = weight.data.T
    return result.view(mx.bfloat16) if bfloat16 else result


def _codes(codes: np.ndarray) -> mx.array | np.ndarray:
    """On MLX, or as they are if huge: MLX cannot adopt numpy's memory, and a second copy of a
    large vocabulary's embedding would double the peak of loading. Their slabs are copied when
    used, a few percent of the product's time. Views into a file are never kept.
    """
    keep = codes.nbytes >= _HUGE and file_map(codes) is None
    return codes if keep else mx.array(codes)


def slabs(shape: tuple[int, int]) -> list[slice]:
    """Runs of output rows of at most `SLAB` weights each."""
    out, inner = shape
    step = max(1, SLAB // inner)
    return [slice(at, min(at + step, out)) for at in range(0, out, step)]


def _by_slabs(shape: tuple[int, int], product: Callable[[slice], mx.array]) -> mx.array:
    """[n, out] from the products of runs of output rows."""
    runs = slabs(shape)
    if len(runs) == 1:
        return product(runs[0])
    parts = []
    for run in runs:
        parts.append(product(run))
        mx.eval(parts[-1])  # one slab in float32 at a time
    return mx.concatenate(parts, axis=-1)
