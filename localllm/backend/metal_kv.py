"""The metal backend's KV pool: MLX arrays written by scatters that take over their buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from localllm.errors import OutOfMemoryPlan
from localllm.spec import AttentionSpec, DecoderSpec
from localllm.spec.memory import kv_groups, kv_layer

# Of K, then V: one array, or codes, scales and biases.
Rows = tuple[mx.array, ...]


@dataclass
class Side:
    """K or V of one layer; every array [blocks * kv_heads * block_size, …]."""

    arrays: list[mx.array]

    def blocks(self, kv_heads: int, block_size: int) -> Rows:
        """The same as [blocks, kv_heads, block_size, …]."""
        return tuple(a.reshape(-1, kv_heads, block_size, a.shape[-1]) for a in self.arrays)


def kv_group_size(head_dim: int) -> int:
    """Entries that share a scale in a quantized cache."""
    return 32 if head_dim % 32 == 0 else 16


class KvPool:
    """K and V of every layer, [blocks, kv_heads, block_size, head_dim] each.

    bits: 16, or 32, by `dtype`; 8 or 4: codes, with a scale and a bias of `dtype` for each group of
    `kv_group_size` entries. Raises OutOfMemoryPlan if it cannot be had.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        num_blocks: Sequence[int],
        block_size: int,
        dtype: mx.Dtype,
        bits: int,
    ) -> None:
        self.block_size, self.bits, self._dtype = block_size, bits, dtype
        self._spec = spec
        self.group_of = [0] * len(spec.layers)
        self._groups = kv_groups(spec)
        for number, group in enumerate(self._groups):
            for layer in group.layers:
                self.group_of[layer] = number
        owners = {index: kv_layer(spec, index) for index, _ in spec.attentions}
        for index, owner in owners.items():
            self.group_of[index] = self.group_of[owner]
        try:
            self.layers: dict[int, tuple[Side, Side]] = {}  # those that attend
            for index, attn in spec.attentions:
                if owners[index] < index:
                    self.layers[index] = self.layers[owners[index]]
                    continue
                blocks = num_blocks[self.group_of[index]]
                self.layers[index] = self._side(attn, blocks), self._side(attn, blocks)
            mx.eval(self.arrays)
        except (MemoryError, RuntimeError, ValueError) as error:
            raise OutOfMemoryPlan(
                f"a KV pool of {list(num_blocks)} blocks does not fit in memory ({error})",
                hint="ask for fewer KV blocks: a shorter context or fewer sequences at once",
            ) from error

    @property
    def arrays(self) -> list[mx.array]:
        return [array for sides in self.layers.values() for side in sides for array in side.arrays]

    def write(self, layer: int, slots: mx.array, k: Rows, v: Rows) -> None:
        """k, v: [n, kv_heads, …] each; slots: int32 [n * kv_heads], see `slots_of`."""
        for side, rows in zip(self.layers[layer], (k, v), strict=True):
            for index, part in enumerate(rows):
                # The pool holds the only reference, so that MLX writes in place.
                side.arrays[index][slots] = part.reshape(-1, part.shape[-1])

    def slots_of(self, layer: int, blocks: np.ndarray, places: np.ndarray) -> np.ndarray:
        """int32 [n * kv_heads]: where the rows of positions at (block, place in it) lie."""
        heads = self._spec.layers[layer].attention.kv_heads
        first = (blocks[:, None] * heads + np.arange(heads)) * self.block_size
        slots: np.ndarray = (first + places[:, None]).astype(np.int32).reshape(-1)
        return slots

    def block(self, group: int, block: int) -> list[np.ndarray]:
        """uint8 views into the pool: every piece of a block. No step may be under way."""
        views = []
        for layer in self._groups[group].layers:
            rows = self._spec.layers[layer].attention.kv_heads * self.block_size
            for side in self.layers[layer]:
                for array in side.arrays:
                    raw = array.view(mx.uint8)
                    mx.eval(raw)
                    views.append(np.array(raw, copy=False)[block * rows : (block + 1) * rows])
        return views

    def _side(self, attn: AttentionSpec, blocks: int) -> Side:
        rows = blocks * attn.kv_heads * self.block_size
        if self.bits >= 16:
            return Side([mx.zeros((rows, attn.head_dim), self._dtype)])
        groups = attn.head_dim // kv_group_size(attn.head_dim)
        return Side(
            [
                mx.zeros((rows, attn.head_dim * self.bits // 32), mx.uint32),
                mx.zeros((rows, groups), self._dtype),
                mx.zeros((rows, groups), self._dtype),
            ]
        )


def quantize(x: mx.array, bits: int) -> Rows:
    """Codes, scales and biases of the last axis in groups, by the rule of `mx.quantize` (which has
    no groups of 16): the end of a group that is farther from 0 is met exactly, and 0 is, too."""
    group, top = kv_group_size(x.shape[-1]), (1 << bits) - 1
    parts = x.astype(mx.float32).reshape(*x.shape[:-1], -1, group)
    low, high = parts.min(axis=-1), parts.max(axis=-1)
    negative = mx.abs(low) > mx.abs(high)
    edge = mx.where(negative, low, high)
    scales = mx.maximum((high - low) / top, 1e-7)
    scales = mx.where(negative, scales, -scales)
    steps = mx.round(edge / scales)
    exact = steps != 0
    scales = mx.where(exact, edge / mx.where(exact, steps, 1), scales)
    biases = mx.where(exact, edge, 0)
    codes = mx.clip(mx.round((parts - biases[..., None]) / scales[..., None]), 0, top)
    words = codes.astype(mx.uint32).reshape(*x.shape[:-1], -1, 32 // bits)
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    packed = (words << shifts).sum(axis=-1).astype(mx.uint32)
    return packed, scales.astype(x.dtype), biases.astype(x.dtype)


def dequantize(rows: Rows, bits: int) -> mx.array:
    """The values that `quantize` gave, in the dtype of the scales."""
    codes, scales, biases = rows
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    values = ((codes[..., None] >> shifts) & ((1 << bits) - 1)).astype(scales.dtype)
    parts = values.reshape(*scales.shape, -1)
    return (parts * scales[..., None] + biases[..., None]).reshape(*scales.shape[:-1], -1)
