"""Adapters of the `metal` backend: low-rank pairs, stacked by target for a step of mixed rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from localllm.adapters.lora import LoraAdapter

_RANK_STEP = 8  # what the kernels need


@dataclass(frozen=True)
class Pair:
    """a: [r, in]; b, times scale and gain: [out, r]; both T, r a multiple of 8 (zeros fill it).

    gain, offset: float32 [out], what DoRA does to y = W x + bias.
    """

    a: mx.array
    b: mx.array
    gain: mx.array | None = None
    offset: mx.array | None = None

    def gained(self, y: mx.array) -> mx.array:
        if self.gain is None:
            return y
        whole = y.astype(mx.float32) * self.gain
        return (whole if self.offset is None else whole + self.offset).astype(y.dtype)


# By target.
Loaded = Mapping[str, Pair]


@dataclass(frozen=True)
class Stack:
    """The pairs of all adapters that have a target. a: [slots, R, in], b: [slots, out, R].

    slots: by the adapter's index in the backend.
    """

    a: mx.array
    b: mx.array
    slots: Mapping[int, int]


# (y, x, stack, slot of each row or -1) -> y with B A x added; None: not that way.
StackedLora = Callable[[mx.array, mx.array, Stack, np.ndarray], mx.array | None]


def to_loaded(adapter: LoraAdapter, dtype: mx.Dtype) -> Loaded:
    loaded = {}
    for target, pair in adapter.targets.items():
        rank = _rounded(pair.rank)
        a = np.zeros((rank, pair.a.shape[1]), np.float32)
        b = np.zeros((pair.b.shape[0], rank), np.float32)
        a[: pair.rank] = pair.a.to_float32()
        b[:, : pair.rank] = pair.scaled_b()
        gains = pair.gains
        loaded[target] = Pair(
            mx.array(a).astype(dtype),
            mx.array(b).astype(dtype),
            None if gains is None else mx.array(gains.values),
            None if gains is None or gains.offset is None else mx.array(gains.offset),
        )
    mx.eval([(pair.a, pair.b) for pair in loaded.values()])
    return loaded


def loaded_bytes(adapter: LoraAdapter, dtype: mx.Dtype) -> int:
    return sum(
        dtype.size * _rounded(pair.rank) * (pair.a.shape[1] + pair.b.shape[0])
        + (0 if pair.gains is None else pair.gains.nbytes)
        for pair in adapter.targets.values()
    )


class Stacks:
    """All loaded adapters by target, restacked when one comes or goes."""

    def __init__(self) -> None:
        self._loaded: dict[int, Loaded] = {}
        self._stacks: dict[str, Stack] = {}

    def add(self, index: int, loaded: Loaded) -> None:
        self._loaded[index] = loaded
        self._restack(loaded)

    def remove(self, index: int) -> None:
        self._restack(self._loaded.pop(index))

    def clear(self) -> None:
        self._loaded.clear()
        self._stacks.clear()

    def __getitem__(self, target: str) -> Stack:
        return self._stacks[target]

    def _restack(self, targets: Loaded) -> None:
        for target in targets:
            having = {i: loaded[target] for i, loaded in self._loaded.items() if target in loaded}
            if not having:
                del self._stacks[target]
                continue
            rank = max(pair.a.shape[0] for pair in having.values())
            parts = [(_filled(p.a, rank, 0), _filled(p.b, rank, 1)) for p in having.values()]
            stack = Stack(
                mx.stack([a for a, _ in parts]),
                mx.stack([b for _, b in parts]),
                {index: slot for slot, index in enumerate(having)},
            )
            mx.eval(stack.a, stack.b)
            self._stacks[target] = stack


class RowAdapters:
    """rows: of each chunk of a step, in order; adapters: their indices, None for the base alone."""

    def __init__(
        self,
        rows: Sequence[int],
        adapters: Sequence[int | None],
        loaded: Mapping[int, Loaded],
        stacks: Stacks,
        stacked: StackedLora,
    ) -> None:
        self._parts = list(zip(rows, adapters, strict=True))
        self._loaded = loaded
        self._stacks = stacks
        self._stacked = stacked
        self._touched = frozenset(target for one in loaded.values() for target in one)

    def __bool__(self) -> bool:
        return bool(self._touched)

    def __call__(self, layer: int, target: str, x: mx.array, y: mx.array) -> mx.array:
        """y [n, out], with what a row's adapter makes of it where it has the target; x: [n, in]."""
        name = f"layers.{layer}.{target}"
        if name not in self._touched:
            return y
        if any(name in one and one[name].gain is not None for one in self._loaded.values()):
            y = self._each(name, y, lambda pair, rows: pair.gained(y[rows]))
        stack = self._stacks[name]
        slots = [stack.slots.get(-1 if a is None else a, -1) for _, a in self._parts]
        counts = [rows for rows, _ in self._parts]
        done = self._stacked(y, x, stack, np.repeat(slots, counts).astype(np.int32))
        if done is not None:
            return done
        return self._each(name, y, lambda pair, rows: y[rows] + (x[rows] @ pair.a.T) @ pair.b.T)

    def touches(self, layer: int, *targets: str) -> bool:
        return any(f"layers.{layer}.{target}" in self._touched for target in targets)

    def _each(self, name: str, y: mx.array, change: Callable[[Pair, slice], mx.array]) -> mx.array:
        """y with the rows changed whose adapter has the target."""
        parts, at = [], 0
        for count, adapter in self._parts:
            rows = slice(at, at + count)
            pair = None if adapter is None else self._loaded[adapter].get(name)
            parts.append(y[rows] if pair is None else change(pair, rows))
            at += count
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _rounded(rank: int) -> int:
    return -(-rank // _RANK_STEP) * _RANK_STEP


def _filled(matrix: mx.array, rank: int, axis: int) -> mx.array:
    missing = rank - matrix.shape[axis]
    if not missing:
        return matrix
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, missing)
    return mx.pad(matrix, widths)
