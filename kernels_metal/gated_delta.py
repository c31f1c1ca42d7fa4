"""The gated delta rule (arXiv:2412.06464): each head's state is carried on row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.kernel import Launch
from localllm.kernels_metal.reference import gated_delta as reference
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

DTYPES = (mx.float16, mx.bfloat16, mx.float32)
LONGEST_KEY = 256  # entries of a key head
_COLUMNS = 4  # entries of a value head that a simdgroup carries
_SIMDGROUPS = 4


class Inputs(NamedTuple):
    """qkv: float32 [rows of the runs, channels]: q and k of all key heads, not yet of length 1,
    then v of all value heads. beta, decay: T [n, heads], half, bfloat16 or float32, of all rows:
    what sigmoid and softplus take. rate, step: float32 [heads].
    """

    qkv: mx.array
    beta: mx.array
    decay: mx.array
    rate: mx.array
    step: mx.array


def gated_delta(inputs: Inputs, states: Sequence[mx.array], runs: Runs) -> Carried:
    """(y, S after the sure rows): a gated delta net between its convolution and its norm.

    states: of each run, float32 [heads, value_dim, key_dim], key_dim <= 256. Returns float32 [rows
    of the runs, heads * value_dim] and other states. Raises ValueError for other shapes and dtypes.
    A row's bits depend on it and on the state before alone.
    """
    _check(inputs, states, runs)
    shape = heads, value_dim, key_dim = states[0].shape
    simdgroups = min(_SIMDGROUPS, -(-value_dim // _COLUMNS))
    groups = -(-value_dim // (_COLUMNS * simdgroups))
    y, *afters = kernel_of_runs("gated_delta", Inputs._fields, len(runs))(
        Launch(
            inputs=[*inputs, as_array(runs), *states],
            grid=(groups * simdgroups * 32, heads, len(runs)),
            threadgroup=(simdgroups * 32, 1, 1),
            output_shapes=[(rows_of(runs), heads * value_dim), *[shape] * len(runs)],
            output_dtypes=[mx.float32] * (1 + len(runs)),
            template=[("T", inputs.beta.dtype), ("KEYS", -(-key_dim // 32))],
        )
    )
    return y, afters


def by_ops(inputs: Inputs, states: Sequence[mx.array], runs: Runs) -> Carried:
    """`gated_delta` in MLX's own ops."""
    qkv, beta, decay, rate, step = inputs
    heads, value_dim, key_dim = states[0].shape
    key_heads = (qkv.shape[1] - heads * value_dim) // (2 * key_dim)
    rows = slice(runs[0].first, runs[-1].rows.stop)
    q, k, v = mx.split(qkv, [key_heads * key_dim, 2 * key_heads * key_dim], axis=-1)
    q, k = (_unit(part.reshape(-1, key_heads, 1, key_dim)) for part in (q, k))
    q, k = (mx.repeat(part, heads // key_heads, axis=1) for part in (q * key_dim**-0.5, k))
    v = v.reshape(-1, heads, value_dim, 1)
    share = mx.sigmoid(beta[rows].astype(mx.float32))[..., None, None]  # [n, H, 1, 1]
    slowed = mx.logaddexp(decay[rows].astype(mx.float32) + step, mx.array(0.0))  # softplus
    kept = mx.exp(-mx.exp(rate) * slowed)[..., None, None]
    outputs, afters = [], []
    for run, state in zip(runs, states, strict=True):
        for row in range(run.first - rows.start, run.rows.stop - rows.start):
            state = state * kept[row]
            change = share[row] * (v[row] - mx.sum(state * k[row], axis=-1, keepdims=True))
            state = state + change * k[row]
            outputs.append(mx.sum(state * q[row], axis=-1).reshape(1, -1))
            if row + 1 == run.first - rows.start + run.sure:
                afters.append(state)
    return joined(outputs), afters


def _unit(x: mx.array) -> mx.array:
    """Scaled to length 1 along the last axis."""
    return x * mx.rsqrt(mx.sum(mx.square(x), axis=-1, keepdims=True) + 1e-6)


def _check(inputs: Inputs, states: Sequence[mx.array], runs: Runs) -> None:
    qkv, beta, decay, rate, step = inputs
    check_runs(runs, states, beta.shape[0])
    shape = states[0].shape
    if len(shape) != 3 or shape[2] > LONGEST_KEY:
        raise ValueError(
            f"states [heads, value_dim, key_dim] with key_dim up to {LONGEST_KEY} are needed, not "
            f"{list(shape)}"
        )
    heads, value_dim, key_dim = shape
    keys = qkv.shape[1] - heads * value_dim if qkv.ndim == 2 else 0
    fits = keys > 0 and keys % (2 * key_dim) == 0 and heads % (keys // (2 * key_dim)) == 0
    gates = beta.shape == decay.shape and beta.ndim == 2 and beta.shape[1] == heads
    if not (fits and gates and rate.shape == step.shape == (heads,)):
        raise ValueError(
            f"qkv {list(qkv.shape)}, beta {list(beta.shape)}, decay {list(decay.shape)}, rate "
            f"{list(rate.shape)} and step {list(step.shape)} do not fit states of {list(shape)}"
        )
    if qkv.shape[0] != rows_of(runs):
        raise ValueError(f"{qkv.shape[0]} rows of qkv for {runs}")
    if beta.dtype not in DTYPES or decay.dtype != beta.dtype:
        raise ValueError(f"beta and decay must have one dtype of {DTYPES}")
    if {qkv.dtype, rate.dtype, step.dtype} != {mx.float32}:
        raise ValueError("qkv, rate and step must be float32")


class _Case(NamedTuple):
    inputs: Inputs
    states: list[mx.array]
    runs: Runs


@lru_cache(maxsize=1)
def case(
    rows: int, key_heads: int, heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
) -> _Case:
    """Random, with states that forget half in some ten rows, as trained ones do."""
    rng = np.random.default_rng(rows + heads + value_dim)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, np.float32))

    inputs = Inputs(
        normal(rows, 2 * key_heads * key_dim + heads * value_dim),
        normal(rows, heads).astype(dtype),
        normal(rows, heads).astype(dtype),
        normal(heads) - 2,
        normal(heads),
    )
    return _Case(
        inputs,
        [normal(heads, value_dim, key_dim)],
        (Run(0, rows, rows),),
    )


# Of the largest value. Only what enters is in the dtype, so all are float32's.
_TOLERANCE = 1e-5


def contests(dtype: mx.Dtype) -> Iterator[Contest]:
    """A decoded row, rows that verify drafts, and chunks of a prompt."""
    for rows, key_heads, heads in ((1, 16, 32), (8, 16, 32), (64, 2, 4)):
        yield contest(rows, key_heads, heads, 128, 128, dtype)


def work(
    rows: int, key_heads: int, heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
) -> str:
    """The entry of the dispatch table."""
    name = str(dtype).removeprefix("mlx.core.")
    states = f"{heads}/{key_heads} heads of {value_dim} x {key_dim}"
    return f"{rows} row{'s' if rows > 1 else ''}, {states}, {name}"


def contest(
    rows: int, key_heads: int, heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
) -> Contest:
    """One sequence's rows."""
    shape = (rows, key_heads, heads, key_dim, value_dim, dtype)

    def made() -> _Case:
        return case(*shape)

    def truth() -> list[np.ndarray]:
        parts, (before,), _ = made()
        qkv, beta, decay, rate, step, state = (
            np.array(a.astype(mx.float32)).astype(np.float64) for a in (*parts, before)
        )
        return list(reference.gated_delta(qkv, beta, decay, rate, step, state, rows))

    entries = rows * (2 * key_heads * key_dim + 2 * heads * value_dim)
    gates = 2 * heads * (rows * dtype.size + 4)
    return Contest(
        kernel="gated_delta",
        work=work(*shape),
        ours=lambda: arrays_of(gated_delta(*made())),
        mlx=lambda: arrays_of(by_ops(*made())),
        truth=truth,
        tolerance=_TOLERANCE,
        least_bytes=gates + 4 * (entries + 2 * heads * value_dim * key_dim),
    )
