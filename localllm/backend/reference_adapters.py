"""Adapters of a step in plain MLX ops, chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from localllm.adapters.lora import LoraAdapter, LowRank
from localllm.backend.reference_parts import Routed


@dataclass(frozen=True)
class Pair:
    """A transposed [in, r], B transposed times the scale [r, out]; float32. Of experts [E, in, r]
    and [E, r, out].

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

    def of(self, expert: int) -> Pair:
        return Pair(self.a[expert], self.b[expert])


Loaded = Mapping[str, Pair]


def to_loaded(adapter: LoraAdapter) -> Loaded:
    return {target: _pair(pair) for target, pair in adapter.targets.items()}


def _pair(pair: LowRank) -> Pair:
    a = mx.array(np.ascontiguousarray(pair.a.to_float32().swapaxes(-1, -2)))
    b = mx.array(np.ascontiguousarray(pair.scaled_b().swapaxes(-1, -2)))
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
        self._edges = np.cumsum([0, *rows])
        self._adapters = adapters

    def __call__(
        self, target: str, x: mx.array, y: mx.array, routed: Routed | None = None
    ) -> mx.array:
        """See `Adapt`."""
        pairs = [adapter.get(target) if adapter else None for adapter in self._adapters]
        if not any(pairs):
            return y
        edges = self._edges
        if routed is not None:
            edges = np.searchsorted(routed.rows, edges)
            pairs = [pair and pair.of(routed.expert) for pair in pairs]
        parts = []
        for begin, end, pair in zip(edges[:-1].tolist(), edges[1:].tolist(), pairs, strict=True):
            part = y[begin:end]
            parts.append(part if pair is None else pair(x[begin:end], part))
        return mx.concatenate(parts)
