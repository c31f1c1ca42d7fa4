"""Adapters of the `metal` backend: low-rank pairs on MLX, and a step's rows through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from localllm.adapters.lora import LoraAdapter

# By target: A [r, in], and B times the scale [out, r]; both T.
Loaded = Mapping[str, tuple[mx.array, mx.array]]


def to_loaded(adapter: LoraAdapter, dtype: mx.Dtype) -> Loaded:
    loaded = {
        target: (
            mx.array(pair.a.to_float32()).astype(dtype),
            mx.array(pair.b.to_float32() * pair.scale).astype(dtype),
        )
        for target, pair in adapter.targets.items()
    }
    mx.eval(list(loaded.values()))
    return loaded


def loaded_bytes(adapter: LoraAdapter, dtype: mx.Dtype) -> int:
    return sum(
        dtype.size * (pair.a.data.size + pair.b.data.size) for pair in adapter.targets.values()
    )


class RowAdapters:
    """rows: of each chunk of a step, in order; adapters: theirs, None for the base alone."""

    def __init__(self, rows: Sequence[int], adapters: Sequence[Loaded | None]) -> None:
        self._parts = list(zip(rows, adapters, strict=True))
        self._touched = frozenset(target for loaded in adapters if loaded for target in loaded)

    def __bool__(self) -> bool:
        return bool(self._touched)

    def __call__(self, layer: int, target: str, x: mx.array, y: mx.array) -> mx.array:
        """y [n, out] = W x, and B A x more where a row's adapter has the target; x: [n, in]."""
        name = f"layers.{layer}.{target}"
        if name not in self._touched:
            return y
        parts, at = [], 0
        for rows, adapter in self._parts:
            part = y[at : at + rows]
            if adapter and name in adapter:
                a, b = adapter[name]
                part = part + (x[at : at + rows] @ a.T) @ b.T
            parts.append(part)
            at += rows
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)
