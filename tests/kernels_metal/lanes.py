"""Runs a kernel in the emulator with lanes taking turns in several orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.emulator.program import Order
from localllm.kernels_metal.kernel import executed_by

# The distance from 1 to the next number, halved: what rounding a value may cost, relative to it.
ROUNDING = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}


def in_every_order(call: Callable[[], Sequence[mx.array]]) -> list[mx.array]:
    """What `call` returns, which must be the same bits in whichever order lanes take turns.

    Strictly: no simdgroup function that some lanes have left, no memory read before it is written,
    and no part of an output left out.
    """
    first: list[mx.array] | None = None
    for order in get_args(Order):
        emulator = Emulator(order=order, seed=7, strict=True)
        with executed_by(emulator):
            outputs = list(call())
        assert all(dispatch.counters.unwritten == 0 for dispatch in emulator.dispatches)
        if first is None:
            first = outputs
        for got, expected in zip(outputs, first, strict=True):
            assert bits(got) == bits(expected), f"the order {order} changes the result"
    assert first is not None
    return first


def bits(array: mx.array) -> bytes:
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()


def wide(array: mx.array) -> np.ndarray:
    """float64, exactly."""
    return np.array(array.astype(mx.float32)).astype(np.float64)
