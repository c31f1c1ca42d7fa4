"""The reference backend's KV pool: float32, in blocks, resident only where written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localllm.errors import OutOfMemoryPlan
from localllm.spec import DecoderSpec
from localllm.spec.memory import kv_group_block_bytes, kv_groups, kv_layer


class KVPool:
    """K and V of every layer, a block holding all layers of its KV group side by side.

    One zeroed numpy array a group, of fixed size: the operating system backs a page of it only when
    a block there is first written, and rows are written in place, which an MLX array cannot do.
    """

    def __init__(self, spec: DecoderSpec, num_blocks: Sequence[int], block_size: int) -> None:
        self.block_size = block_size
        self.blocks: list[np.ndarray] = []  # of each group: float32 [blocks, values]
        self.group_of = [0] * len(spec.layers)
        self._keys: dict[int, np.ndarray] = {}
        self._values: dict[int, np.ndarray] = {}
        for number, group in enumerate(kv_groups(spec)):
            values = kv_group_block_bytes(spec, group, block_size) // 4
            self.blocks.append(_zeros(num_blocks[number], values))
            at = 0
            for index in group.layers:
                self.group_of[index] = number
                attn = spec.layers[index].attention
                heads, size = attn.kv_heads, attn.head_dim
                for views in (self._keys, self._values):
                    part = self.blocks[-1][:, at : at + block_size * heads * size]
                    # [blocks, block_size, kv_heads, head_dim], a view into the pool
                    views[index] = part.reshape(-1, block_size, heads, size)
                    assert np.shares_memory(views[index], self.blocks[-1])
                    at += block_size * heads * size
        for index, _ in spec.attentions:
            owner = kv_layer(spec, index)
            self.group_of[index] = self.group_of[owner]
            self._keys[index], self._values[index] = self._keys[owner], self._values[owner]

    def write(
        self, layer: int, slots: tuple[np.ndarray, np.ndarray], k: np.ndarray, v: np.ndarray
    ) -> None:
        """k, v: float32 [n, kv_heads, head_dim]. slots: block and place in it of each row."""
        self._keys[layer][slots] = k
        self._values[layer][slots] = v

    def read(
        self, layer: int, block_table: np.ndarray, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """K and V of the positions start … stop - 1: float32 [stop - start, kv_heads, head_dim]."""
        first, last = start // self.block_size, -(-stop // self.block_size)
        blocks = block_table[first:last]
        skip = start - first * self.block_size
        k, v = (
            pool[layer][blocks].reshape(-1, *pool[layer].shape[2:])[skip : skip + stop - start]
            for pool in (self._keys, self._values)
        )
        return k, v


def _zeros(blocks: int, values: int) -> np.ndarray:
    try:
        return np.zeros((blocks, values), np.float32)
    except (MemoryError, ValueError) as error:
        raise OutOfMemoryPlan(
            f"a KV pool of {blocks} blocks of {4 * values} bytes does not fit in memory",
            hint="ask for fewer KV blocks: a shorter context or fewer sequences at once",
        ) from error
