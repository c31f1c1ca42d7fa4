"""Weights as they lie in a file, without loss: dense arrays, or affine codes by groups.

    w[..., c] = scale[..., g] * (code[..., c] - zero_point) + bias[..., g],   g = c // group

Every GGUF block format below IQ, and every MLX affine format, is exactly of this form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from localllm.checkpoint.packing import pack_codes, unpack_codes

__all__ = ["Affine", "DType", "Dense", "GroupValues", "Tensor", "pack_codes"]

# Weights widened at a time by `Affine.to_float32`: temporaries stay near a megabyte.
_CHUNK = 1 << 18

DType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Dense:
    """`data`: float32, float16, or uint16 holding the bits of bfloat16 (numpy has none)."""

    data: np.ndarray
    dtype: DType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def to_float32(self) -> np.ndarray:
        if self.dtype == "bfloat16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        return self.data.astype(np.float32, copy=False)

    def rows(self, index: np.ndarray | slice) -> Dense:
        """The chosen output rows (axis -2 of a matrix, axis -1 of a vector)."""
        return replace(self, data=self.data[_row_index(self.data.ndim, index)])

    def columns(self, index: np.ndarray) -> Dense:
        """The chosen inputs (the last axis)."""
        return replace(self, data=self.data[..., index])


@dataclass(frozen=True)
class GroupValues:
    """One float per group, flat or in two levels as K-quants keep them.

    values: float16 | float32 [..., S]; multiplier: None, or uint8 | int8 [..., G] with G = S * k.
    The value of group g is values[..., g // k] * multiplier[..., g], exact in float32.
    """

    values: np.ndarray
    multiplier: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.multiplier is None else self.multiplier.nbytes)

    def to_float32(self) -> np.ndarray:
        """float32 [..., G]."""
        values = self.values.astype(np.float32, copy=False)
        if self.multiplier is None:
            return values
        per = self.multiplier.shape[-1] // values.shape[-1]
        widened: np.ndarray = np.repeat(values, per, axis=-1) * self.multiplier
        return widened

    def flat(self, rows: int) -> GroupValues:
        """The same values as one matrix [rows, …]."""
        return GroupValues(
            self.values.reshape(rows, self.values.shape[-1]),
            None
            if self.multiplier is None
            else self.multiplier.reshape(rows, self.multiplier.shape[-1]),
        )

    def rows(self, index: np.ndarray | slice) -> GroupValues:
        at = _row_index(self.values.ndim, index)
        return GroupValues(
            self.values[at], None if self.multiplier is None else self.multiplier[at]
        )

    def groups(self, index: np.ndarray) -> GroupValues:
        """The chosen groups; each has a value of its own then."""
        if self.multiplier is None:
            return GroupValues(self.values[..., index])
        per = self.multiplier.shape[-1] // self.values.shape[-1]
        return GroupValues(self.values[..., index // per], self.multiplier[..., index])


@dataclass(frozen=True)
class Affine:
    """Codes by groups along the last axis.

    codes: uint32 [..., out, in * bits / 32], a little-endian bit stream along each row: code c
    stands at bits [c * bits, (c + 1) * bits). This is MLX's packing for every width.
    """

    codes: np.ndarray
    bits: int
    group: int
    scales: GroupValues
    biases: GroupValues | None = None
    zero_point: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 32 // self.bits)

    @property
    def nbytes(self) -> int:
        return (
            self.codes.nbytes
            + self.scales.nbytes
            + (0 if self.biases is None else self.biases.nbytes)
        )

    def unpack(self) -> np.ndarray:
        """uint8 codes [..., out, in]."""
        return unpack_codes(self.codes, self.bits)

    def to_float32(self) -> np.ndarray:
        """float32 [..., out, in], rounded once per product and once per sum."""
        width = self.shape[-1]
        result = np.empty(self.shape, np.float32)
        rows = result.reshape(math.prod(self.shape[:-1]), width)
        flat = self._flat(len(rows))
        step = max(1, _CHUNK // max(1, width))
        for start in range(0, len(rows), step):
            part = flat.rows(slice(start, start + step))
            weights = rows[start : start + step].reshape(-1, width // self.group, self.group)
            np.subtract(
                part.unpack().reshape(weights.shape), np.float32(self.zero_point), out=weights
            )
            weights *= part.scales.to_float32()[..., None]
            if part.biases is not None:
                weights += part.biases.to_float32()[..., None]
        return result

    def _flat(self, rows: int) -> Affine:
        """The same weights as one matrix [rows, in]."""
        return replace(
            self,
            codes=self.codes.reshape(rows, self.codes.shape[-1]),
            scales=self.scales.flat(rows),
            biases=None if self.biases is None else self.biases.flat(rows),
        )

    def rows(self, index: np.ndarray | slice) -> Affine:
        """The chosen output rows; exact, since groups run along the input."""
        return replace(
            self,
            codes=self.codes[_row_index(self.codes.ndim, index)],
            scales=self.scales.rows(index),
            biases=None if self.biases is None else self.biases.rows(index),
        )

    def columns(self, index: np.ndarray) -> Affine:
        """The chosen inputs. Raises ValueError unless whole groups move."""
        groups = index.reshape(-1, self.group) if index.size % self.group == 0 else index[:, None]
        first = groups[:, 0]
        if not np.array_equal(groups, first[:, None] + np.arange(self.group)) or np.any(
            first % self.group
        ):
            raise ValueError(f"its groups of {self.group} weights would be torn apart")
        chosen = first // self.group
        return replace(
            self,
            codes=pack_codes(self.unpack()[..., index], self.bits),
            scales=self.scales.groups(chosen),
            biases=None if self.biases is None else self.biases.groups(chosen),
        )

    def scaled(self, factor: np.ndarray) -> Affine:
        """Times one float32, or one for each matrix of [E, out, in]; rounded once a group."""
        assert self.biases is None, "only formats without biases have a factor beside them"
        by = factor.astype(np.float32).reshape(-1, *(1,) * (self.codes.ndim - 1))
        by = by[0] if by.size == 1 else by
        return replace(self, scales=GroupValues(self.scales.to_float32() * by))


Tensor = Dense | Affine


def _row_index(ndim: int, index: np.ndarray | slice) -> tuple[np.ndarray | slice, ...]:
    if ndim == 1:
        return (index,)
    return (*(slice(None),) * (ndim - 2), index)
