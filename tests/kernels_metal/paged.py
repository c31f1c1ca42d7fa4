"""What the tests of both paged attention kernels share."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.kernel import executed_by

# Half the distance from 1 to the next number of a dtype: rounding the result costs this at most.
ROUNDING = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}
# Sums and exponentials are float32 for every dtype. A score here is below 8, the sum of at most 32
# matrix products, each rounded to it: 8 * sqrt(32) * 2^-24 = 2.7e-6 off, and so is, relatively,
# its weight; the weighted sum adds less.
SUMMING = 2.0**-18


def error(got: mx.array, truth: np.ndarray) -> float:
    """The largest, relative to the largest value of the truth; NaN counts as infinite."""
    difference = np.abs(np.array(got.astype(mx.float32)).astype(np.float64) - truth)
    return float(np.max(np.nan_to_num(difference, nan=np.inf)) / np.max(np.abs(truth)))


def assert_right(got: mx.array, truth: np.ndarray) -> None:
    assert error(got, truth) <= ROUNDING[got.dtype] + SUMMING


def bits(array: mx.array) -> bytes:
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()


def emulated(call: Callable[[], mx.array], order: str = "forward", **how: object) -> mx.array:
    with executed_by(Emulator(order=order, seed=3, **how)):  # type: ignore[arg-type]
        out = call()
        mx.eval(out)
        return out


def in_every_order(call: Callable[[], mx.array]) -> mx.array:
    """What `call` returns: the same bits in whichever order lanes take turns."""
    first, *others = [emulated(call, order) for order in ("forward", "reverse", "random")]
    for other in others:
        assert bits(other) == bits(first)
    return first
