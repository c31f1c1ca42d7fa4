"""MLX arrays as the bytes that a kernel sees, and back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

TYPE_NAMES = {mx.float16: "half", mx.bfloat16: "bfloat16_t", mx.float32: "float"}


def to_numpy(array: mx.array) -> np.ndarray:
    """Row by row; bfloat16 as uint16, since NumPy has no such type."""
    array = mx.contiguous(array)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    mx.eval(array)
    return np.array(array)


def to_mlx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The inverse: uint16 becomes bfloat16 where `dtype` says so."""
    found = mx.array(array)
    return found.view(mx.bfloat16) if dtype == mx.bfloat16 else found


def empty(shape: tuple[int, ...], dtype: mx.Dtype) -> np.ndarray:
    """What an output holds before the kernel runs: all ones, which is NaN in every float type."""
    width = np.dtype(np.uint8).itemsize * dtype.size
    raw = np.full(int(np.prod(shape)) * width, 0xFF, np.uint8)
    kinds = {mx.float16: np.float16, mx.bfloat16: np.uint16, mx.float32: np.float32}
    return raw.view(kinds[dtype]).reshape(shape)
