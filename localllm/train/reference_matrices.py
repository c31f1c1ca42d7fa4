"""Matrices that autodiff goes through: frozen ones of any kind, and ones that are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import mlx.core as mx

from localllm.backend.reference_linear import (
    Matrix,
    Part,
    slabs,
    to_matrices,
    to_matrix,
    to_vector,
)
from localllm.backend.reference_parts import Weight
from localllm.checkpoint.tensor import Tensor


class FrozenMatrix(Part):
    """A matrix without a gradient of its own; it is made float32 anew on the way back.

    So a quantized matrix costs no more than its codes between forward and backward.
    """

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix

        @mx.custom_function
        def product(x: mx.array) -> mx.array:
            return matmul(matrix, x)

        @product.vjp
        def back(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
            return turned_matmul(matrix, cotangent)

        self._product = cast(Callable[[mx.array], mx.array], product)

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    def matmul(self, x: mx.array) -> mx.array:
        """float32 [n, in] -> [n, out]."""
        return self._product(x)

    def rows(self, index: mx.array) -> mx.array:
        """See `DenseMatrix.rows`."""
        return self.matrix.rows(index)

    def slab(self, rows: slice) -> mx.array:
        """See `DenseMatrix.slab`."""
        return self.matrix.slab(rows)


class TrainedMatrix(Part):
    """[out, in] in float32, itself differentiated."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        out, inner = self.weight.shape
        return out, inner

    def matmul(self, x: mx.array) -> mx.array:
        """float32 [n, in] -> [n, out]."""
        return x @ self.weight.T

    def rows(self, index: mx.array) -> mx.array:
        """See `DenseMatrix.rows`."""
        return mx.take(self.weight, index, axis=0)

    def slab(self, rows: slice) -> mx.array:
        """See `DenseMatrix.slab`."""
        return self.weight[rows]


def frozen(tensor: Tensor) -> Weight:
    """A tensor of the base model as the decoder takes it."""
    if len(tensor.shape) == 1:
        return to_vector(tensor)
    if len(tensor.shape) == 2:
        return FrozenMatrix(to_matrix(tensor))
    return [FrozenMatrix(matrix) for matrix in to_matrices(tensor)]


def trained(arrays: Mapping[str, mx.array]) -> dict[str, Weight]:
    """Weights under differentiation as the decoder takes them, by the same names."""
    return {name: _trained(array) for name, array in arrays.items()}


def _trained(array: mx.array) -> Weight:
    if array.ndim == 1:
        return array
    if array.ndim == 2:
        return TrainedMatrix(array)
    return [TrainedMatrix(array[index]) for index in range(array.shape[0])]


def matmul(matrix: Matrix, x: mx.array, *, stepwise: bool = False) -> mx.array:
    """float32 [n, in] -> [n, out]: x W^T, a slab of W in float32 after the other.

    stepwise: compute each before the next is read. Not under differentiation, which would keep
    what is computed.
    """
    parts = []
    for run in slabs(matrix.shape):
        parts.append(x @ mx.contiguous(matrix.slab(run).T))
        if stepwise:
            mx.eval(parts[-1])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def turned_matmul(matrix: Matrix, y: mx.array, *, stepwise: bool = False) -> mx.array:
    """float32 [n, out] -> [n, in]: y W."""
    x: mx.array | None = None
    for run in slabs(matrix.shape):
        part = y[:, run] @ matrix.slab(run)
        x = part if x is None else x + part
        if stepwise:
            mx.eval(x)
    assert x is not None
    return x
