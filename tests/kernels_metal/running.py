"""Running kernels in the emulator, and how far from the truth a result may be."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.kernel import executed_by

DTYPES = (mx.float16, mx.bfloat16, mx.float32)

# Half the distance from 1 to the next value: what one rounding may change.
ROUNDING = {mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8, mx.float32: 2.0**-24}
TINY = {
    mx.float16: 2.0**-25,
    mx.bfloat16: 0.0,
    mx.float32: 0.0,
}  # below it, halves are spaced evenly


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("mlx.core.") if isinstance(value, mx.Dtype) else None


def bits_of(array: mx.array) -> np.ndarray:
    """The array's bits, as unsigned integers."""
    return np.array(array.view(mx.uint32 if array.dtype.size == 4 else mx.uint16))


def f64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def emulated(compute: Callable[[], mx.array]) -> mx.array:
    with executed_by(Emulator()):
        return compute()


def in_every_order(compute: Callable[[], mx.array]) -> mx.array:
    """The result, once lanes that take turns in three orders have given the same bits."""
    results = []
    for order in ("forward", "reverse", "random"):
        with executed_by(Emulator(order=order, seed=7)):
            results.append(compute())
    for other in results[1:]:
        np.testing.assert_array_equal(bits_of(other), bits_of(results[0]))
    return results[0]


def assert_near(got: mx.array, truth: np.ndarray, before_rounding: np.ndarray | float) -> None:
    """Within `before_rounding` of the truth, and one rounding to the dtype."""
    allowed = before_rounding + ROUNDING[got.dtype] * (np.abs(truth) + before_rounding)
    error = np.abs(f64(got) - truth)
    assert (error <= allowed + TINY[got.dtype]).all(), (error / allowed).max()


def check_contest(contest: Contest) -> None:
    """Our way and MLX's own give the truth, to the tolerance that the contest states."""
    assert contest.mlx is not None
    with executed_by(Emulator()):
        ours = contest.ours()
    for truth, *results in zip(contest.truth(), ours, contest.mlx(), strict=True):
        for result in results:
            assert np.abs(f64(result) - truth).max() <= contest.tolerance * np.abs(truth).max()
