"""Weights of the `metal` backend on MLX: dense, quantized as MLX takes it, stacks of experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from localllm.backend.weights import checked_weights
from localllm.checkpoint.tensor import Affine, Dense, Tensor
from localllm.spec import DecoderSpec

GROUPS = (32, 64, 128)  # that MLX's quantized matmul takes
BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class DenseMatrix:
    """weight: T [out, in], or [experts, out, in]."""

    weight: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def matmul(self, x: mx.array) -> mx.array:
        """T [n, in] -> [n, out]."""
        return x @ self.weight.T

    def rows(self, index: mx.array) -> mx.array:
        """T [n, in]."""
        return self.weight[index]

    def gathered(self, x: mx.array, experts: mx.array, in_order: bool) -> mx.array:
        """[…, 1, in] -> […, 1, out], each through its own expert. in_order: sorted by expert."""
        turned = self.weight.swapaxes(-1, -2)
        return mx.gather_mm(x, turned, rhs_indices=experts, sorted_indices=in_order)


@dataclass(frozen=True)
class QuantizedMatrix:
    """w = scale * code + bias by groups of 32, 64 or 128 along the input.

    codes: uint32 [out, in * bits / 32] in MLX's packing; scales, biases: T [out, in / group].
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.group)

    def matmul(self, x: mx.array) -> mx.array:
        """T [n, in] -> [n, out]."""
        return mx.quantized_matmul(
            x, self.codes, self.scales, self.biases, group_size=self.group, bits=self.bits
        )

    def rows(self, index: mx.array) -> mx.array:
        """T [n, in]."""
        parts = (self.codes[index], self.scales[index], self.biases[index])
        return mx.dequantize(*parts, group_size=self.group, bits=self.bits)

    def gathered(self, x: mx.array, experts: mx.array, in_order: bool) -> mx.array:
        """See `DenseMatrix.gathered`."""
        return mx.gather_qmm(
            x,
            self.codes,
            self.scales,
            self.biases,
            rhs_indices=experts,
            group_size=self.group,
            bits=self.bits,
            sorted_indices=in_order,
        )


@dataclass(frozen=True)
class HalvedMatrix:
    """Groups of 16, which MLX lacks: the even ones and the odd ones as two matrices of groups of
    32, each against an input in which the other half of every 32 is zero. Codes are read twice."""

    even: QuantizedMatrix
    odd: QuantizedMatrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.even.shape

    def matmul(self, x: mx.array) -> mx.array:
        """T [n, in] -> [n, out]."""
        even, odd = self._halves(x)
        return self.even.matmul(even) + self.odd.matmul(odd)

    def rows(self, index: mx.array) -> mx.array:
        """T [n, in]."""
        even = self.even.rows(index).reshape(len(index), -1, 2, 16)
        odd = self.odd.rows(index).reshape(len(index), -1, 2, 16)
        return mx.stack([even[:, :, 0], odd[:, :, 1]], axis=2).reshape(len(index), -1)

    def gathered(self, x: mx.array, experts: mx.array, in_order: bool) -> mx.array:
        """See `DenseMatrix.gathered`."""
        even, odd = self._halves(x)
        return self.even.gathered(even, experts, in_order) + self.odd.gathered(
            odd, experts, in_order
        )

    def _halves(self, x: mx.array) -> tuple[mx.array, mx.array]:
        parts = x.reshape(*x.shape[:-1], -1, 2, 16)
        even, odd, zero = parts[..., 0, :], parts[..., 1, :], mx.zeros_like(parts[..., 0, :])
        return (
            mx.stack([even, zero], axis=-2).reshape(x.shape),
            mx.stack([zero, odd], axis=-2).reshape(x.shape),
        )


Matrix = DenseMatrix | QuantizedMatrix | HalvedMatrix


def load(
    spec: DecoderSpec, weights: Iterable[tuple[str, Tensor]], dtype: mx.Dtype
) -> dict[str, mx.array | Matrix]:
    """Vectors in float32, matrices as they are with scales in `dtype`; one at a time."""
    parts: dict[str, mx.array | Matrix] = {}
    for name, tensor in checked_weights(spec, weights):
        one = to_vector(tensor) if len(tensor.shape) == 1 else to_matrix(tensor, dtype)
        mx.eval(arrays_of(one))
        parts[name] = one
        del tensor  # else it would live on while the next one is read
    return parts


def to_vector(tensor: Tensor) -> mx.array:
    """float32 [n]."""
    return mx.array(tensor.to_float32())


def to_matrix(tensor: Tensor, dtype: mx.Dtype) -> Matrix:
    """Widths and groups that MLX cannot take become dense, exactly but for `dtype`."""
    if isinstance(tensor, Affine):
        inner, group = tensor.shape[-1], tensor.group
        if tensor.bits in BITS and inner % group == 0 and group in GROUPS:
            return _quantized(tensor, dtype)
        if tensor.bits in BITS and group == 16 and inner % 32 == 0:
            return _halved(tensor, dtype)
        tensor = Dense(tensor.to_float32(), "float32")
    return DenseMatrix(_array(tensor).astype(dtype))


def arrays_of(part: mx.array | Matrix) -> list[mx.array]:
    """All arrays of a weight."""
    if isinstance(part, mx.array):
        return [part]
    if isinstance(part, DenseMatrix):
        return [part.weight]
    if isinstance(part, HalvedMatrix):
        return [*arrays_of(part.even), part.odd.scales, part.odd.biases]
    return [part.codes, part.scales, part.biases]


def checkpoint_dtype(spec: DecoderSpec, dense: Iterable[str]) -> mx.Dtype:
    """What to compute in. dense: the dtypes of the checkpoint's dense weights.

    float16 holds three more bits, bfloat16 does not overflow; models that were trained in
    bfloat16, and families whose activations are known to pass 65504, get the latter.
    """
    wide = spec.architecture.startswith(("gemma", "qwen")) or "bfloat16" in set(dense)
    return mx.bfloat16 if wide else mx.float16


def _array(tensor: Dense) -> mx.array:
    if tensor.dtype == "bfloat16":
        return mx.array(tensor.data.view(np.uint16)).view(mx.bfloat16)
    return mx.array(tensor.data)


def _quantized(tensor: Affine, dtype: mx.Dtype) -> QuantizedMatrix:
    scales, biases = _scales_and_biases(tensor)
    return QuantizedMatrix(
        mx.array(tensor.codes),
        mx.array(scales).astype(dtype),
        mx.array(biases).astype(dtype),
        tensor.bits,
        tensor.group,
    )


def _halved(tensor: Affine, dtype: mx.Dtype) -> HalvedMatrix:
    scales, biases = _scales_and_biases(tensor)
    codes = mx.array(tensor.codes)

    def half(at: int) -> QuantizedMatrix:
        s, b = (
            mx.array(np.ascontiguousarray(values[..., at::2])).astype(dtype)
            for values in (scales, biases)
        )
        return QuantizedMatrix(codes, s, b, tensor.bits, 32)

    return HalvedMatrix(half(0), half(1))


def _scales_and_biases(tensor: Affine) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., groups], so that w = scale * code + bias."""
    scales = tensor.scales.to_float32()
    biases: np.ndarray[Any, Any] = scales * np.float32(-tensor.zero_point)
    if tensor.biases is not None:
        biases = biases + tensor.biases.to_float32()
    return scales, biases
