"""Adapters of a step in plain MLX ops, chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from localllm.adapters.lora import LoraAdapter

# By target: A transposed [in, r], and B transposed times the scale [r, out]; float32.
Loaded = Mapping[str, tuple[mx.array, mx.array]]


def to_loaded(adapter: LoraAdapter) -> Loaded:
    return {
        target: (
            mx.array(pair.a.to_float32().T.copy()),
            mx.array(pair.b.to_float32().T * pair.scale),
        )
        for target, pair in adapter.targets.items()
    }


def loaded_bytes(adapter: LoraAdapter) -> int:
    return sum(4 * (p.a.data.size + p.b.data.size) for p in adapter.targets.values())


class RowAdapters:
    """rows: of each chunk of a step, in order; adapters: theirs, None for the base alone."""

    def __init__(self, rows: Sequence[int], adapters: Sequence[Loaded | None]) -> None:
        self._parts = list(zip(rows, adapters, strict=True))

    def __call__(self, target: str, x: mx.array, y: mx.array) -> mx.array:
        """y [n, out] = W x, and B A x more where a row's adapter has the target; x: [n, in]."""
        if not any(adapter and target in adapter for _, adapter in self._parts):
            return y
        parts, at = [], 0
        for rows, adapter in self._parts:
            part = y[at : at + rows]
            if adapter and target in adapter:
                a, b = adapter[target]
                part = part + (x[at : at + rows] @ a) @ b
            parts.append(part)
            at += rows
        return mx.concatenate(parts)
