"""The causal convolutions of recurrent layers: each channel by itself, over the last few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.kernel import Launch
from localllm.kernels_metal.reference import causal_conv as reference
from localllm.kernels_metal.runs import (
    Carried,
    Run,
    Runs,
    arrays_of,
    as_array,
    check_runs,
    joined,
    kernel_of_runs,
    rows_of,
)

Kind = Literal["delta", "short"]
DTYPES = (mx.float16, mx.bfloat16, mx.float32)
_THREADS = 256


def delta_conv(x: mx.array, states: Sequence[mx.array], taps: mx.array, runs: Runs) -> Carried:
    """(y, states after the sure rows): the convolution before a gated delta net, and SiLU after it.

    x: T [n, channels], half, bfloat16 or float32. states: of each run, float32 [kernel - 1,
    channels], the rows before it, the oldest first. taps: float32 [kernel, channels], the oldest
    row's first. Returns float32 [rows of the runs, channels] and other states. Raises ValueError
    for other shapes and dtypes. A row's bits depend on it and the kernel - 1 before it alone.
    """
    return _launched(x, states, taps, runs, "delta")


def short_conv(x: mx.array, states: Sequence[mx.array], taps: mx.array, runs: Runs) -> Carried:
    """(y, states after the sure rows): LFM2's convolution, between its two gates.

    x: T [n, 3 * channels]: the gate before, the gate after, and what passes them. Returns T [rows
    of the runs, channels] and other states, of what passed the first gate. taps may have a row
    more, which is added. All else is as in `delta_conv`.
    """
    return _launched(x, states, taps, runs, "short")


def delta_by_ops(x: mx.array, states: Sequence[mx.array], taps: mx.array, runs: Runs) -> Carried:
    """`delta_conv` in MLX's own ops."""
    outputs, afters = [], []
    for run, state in zip(runs, states, strict=True):
        y, after = _by_ops(x[run.rows].astype(mx.float32), state, taps, run)
        outputs.append(y * mx.sigmoid(y))
        afters.append(after)
    return joined(outputs), afters


def short_by_ops(x: mx.array, states: Sequence[mx.array], taps: mx.array, runs: Runs) -> Carried:
    """`short_conv` in MLX's own ops."""
    outputs, afters = [], []
    for run, state in zip(runs, states, strict=True):
        before, gate, inner = mx.split(x[run.rows].astype(mx.float32), 3, axis=-1)
        y, after = _by_ops(before * inner, state, taps, run)
        outputs.append((gate * y).astype(x.dtype))
        afters.append(after)
    return joined(outputs), afters


def _by_ops(rows: mx.array, state: mx.array, taps: mx.array, run: Run) -> tuple[mx.array, mx.array]:
    kept = state.shape[0]
    seen = mx.concatenate([state, rows])  # [kept + count, channels]
    y = seen[: run.count] * taps[0]
    for tap in range(1, kept + 1):
        y = y + seen[tap : tap + run.count] * taps[tap]
    if taps.shape[0] > kept + 1:
        y = y + taps[kept + 1]
    # Gathered, for a slice would keep all of `seen`.
    return y, seen[mx.arange(run.sure, run.sure + kept)]


def _launched(
    x: mx.array, states: Sequence[mx.array], taps: mx.array, runs: Runs, kind: Kind
) -> Carried:
    _check(x, states, taps, runs, kind)
    gated = kind == "short"
    out = x.dtype if gated else mx.float32
    (kept, channels), rows = states[0].shape, rows_of(runs)
    threads = min(_THREADS, -(-channels // 32) * 32)
    kernel = kernel_of_runs("causal_conv", ("x", "taps"), len(runs))
    y, *afters = kernel(
        Launch(
            inputs=[x, taps, as_array(runs), *states],
            grid=(-(-channels // threads) * threads, rows + kept * len(runs), 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(rows, channels), *[(kept, channels)] * len(runs)],
            output_dtypes=[out, *[mx.float32] * len(runs)],
            template=[("T", x.dtype), ("U", out), ("GATED", gated)],
        )
    )
    return y, afters


def _check(x: mx.array, states: Sequence[mx.array], taps: mx.array, runs: Runs, kind: Kind) -> None:
    check_runs(runs, states, x.shape[0])
    if x.ndim != 2 or taps.ndim != 2 or states[0].ndim != 2:
        raise ValueError("x, taps and states are matrices")
    (kept, channels), gated = states[0].shape, kind == "short"
    rows = [kept + 1, kept + 2] if gated else [kept + 1]
    fits = x.shape[1] == (3 if gated else 1) * channels
    if not fits or taps.shape[1] != channels or taps.shape[0] not in rows:
        raise ValueError(
            f"x {list(x.shape)}, states {[kept, channels]} and taps {list(taps.shape)} do not fit "
            "each other"
        )
    if x.dtype not in DTYPES or taps.dtype != mx.float32:
        raise ValueError(f"x must be one of {DTYPES}, taps float32")


class Ways(NamedTuple):
    """(x, states, taps, runs) -> what one of these convolutions carries."""

    kernel: Callable[[mx.array, Sequence[mx.array], mx.array, Runs], Carried]
    ops: Callable[[mx.array, Sequence[mx.array], mx.array, Runs], Carried]


WAYS: dict[Kind, Ways] = {
    "delta": Ways(delta_conv, delta_by_ops),
    "short": Ways(short_conv, short_by_ops),
}


class _Case(NamedTuple):
    x: mx.array
    states: list[mx.array]
    taps: mx.array
    runs: Runs


@lru_cache(maxsize=1)
def case(kind: Kind, rows: int, channels: int, kernel: int, dtype: mx.Dtype) -> _Case:
    """Random; the sums are around 1."""
    rng = np.random.default_rng(rows + channels)

    def normal(*shape: int, size: float = 1.0) -> mx.array:
        return mx.array(size * rng.standard_normal(shape, np.float32))

    width = 3 * channels if kind == "short" else channels
    taps = normal(kernel, channels, size=kernel**-0.5)
    state = normal(kernel - 1, channels)
    return _Case(normal(rows, width).astype(dtype), [state], taps, (Run(0, rows, rows),))


# Of the largest value: float32's own; what LFM2's gives is rounded to the dtype, too.
_TOLERANCE = 1e-5
_ROUNDED = {mx.float16: 1e-3, mx.bfloat16: 8e-3, mx.float32: _TOLERANCE}


def contests(dtype: mx.Dtype) -> Iterator[Contest]:
    """A decoded row and chunks of a prompt, at the widths of Qwen 3.5 9B and LFM2."""
    for rows in (1, 8, 64):
        yield contest("delta", rows, 8192, 4, dtype)
        yield contest("short", rows, 2048, 3, dtype)


def work(kind: Kind, rows: int, channels: int, kernel: int, dtype: mx.Dtype) -> str:
    """The entry of the dispatch table."""
    name = str(dtype).removeprefix("mlx.core.")
    return f"{kind}, {rows} x {channels}, {kernel} taps, {name}"


def contest(kind: Kind, rows: int, channels: int, kernel: int, dtype: mx.Dtype) -> Contest:
    """One sequence's rows."""

    def made() -> _Case:
        return case(kind, rows, channels, kernel, dtype)

    def truth() -> list[np.ndarray]:
        work = made()
        x, state, taps = (
            np.array(array.astype(mx.float32)).astype(np.float64)
            for array in (work.x, work.states[0], work.taps)
        )
        return list(_TRUTH[kind](x, state, taps, rows))

    ways = WAYS[kind]
    wide, out = (3 * dtype.size, dtype.size) if kind == "short" else (dtype.size, 4)
    return Contest(
        kernel="causal_conv",
        work=work(kind, rows, channels, kernel, dtype),
        ours=lambda: arrays_of(ways.kernel(*made())),
        mlx=lambda: arrays_of(ways.ops(*made())),
        truth=truth,
        tolerance=_ROUNDED[dtype] if kind == "short" else _TOLERANCE,
        least_bytes=channels * (rows * (wide + out) + 4 * (2 * (kernel - 1) + kernel)),
    )


_TRUTH = {"delta": reference.delta_conv, "short": reference.short_conv}
