"""Adapters of a step in plain MLX ops, chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from localllm.adapters.lora import LoraAdapter, LowRank


@dataclass(frozen=True)
class Pair:
    """A transposed [in, r], B transposed times the scale [r, out]; float32.

    With DoRA B has the gains in it, too; gain, offset [out]: for y.
    """

    a: mx.array
    b: mx.array
    gain: mx.array | None = None
    offset: mx.array | None = None

    def __call__(self, x: mx.array, y: mx.array) -> mx.array:
        """y [n, out] = W x + bias, as the adapter has it; x: [n, in]."""
        if self.gain is not None:
            y = y * self.gain
        if self.offset is not None:
            y = y + self.offset
        return y + (x @ self.a) @ self.b


Loaded = Mapping[str, Pair]


def to_loaded(adapter: LoraAdapter) -> Loaded:
    return {target: _pair(pair) for target, pair in adapter.targets.items()}


def _pair(pair: LowRank) -> Pair:
    a, b = mx.array(pair.a.to_float32().T.copy()), mx.array(pair.scaled_b().T)
    if pair.gains is None:
        return Pair(a, b)
    offset = pair.gains.offset
    return Pair(a, b, mx.array(pair.gains.values), None if offset is None else mx.array(offset))


def loaded_bytes(adapter: LoraAdapter) -> int:
    return sum(
        4 * (p.a.data.size + p.b.data.size) + (0 if p.gains is None else p.gains.nbytes)
        for p in adapter.targets.values()
    )


class RowAdapters:
    """rows: of each chunk of a step, in order; adapters: theirs, None for the base alone."""

    def __init__(self, rows: Sequence[int], adapters: Sequence[Loaded | None]) -> None:
        self._parts = list(zip(rows, adapters, strict=True))

    def __call__(self, target: str, x: mx.array, y: mx.array) -> mx.array:
        """y [n, out], with what a row's adapter makes of it where it has the target; x: [n, in]."""
        if not any(adapter and target in adapter for _, adapter in self._parts):
            return y
        parts, at = [], 0
        for rows, adapter in self._parts:
            part = y[at : at + rows]
            if adapter and target in adapter:
                part = adapter[target](x[at : at + rows], part)
            parts.append(part)
            at += rows
        return mx.concatenate(parts)
