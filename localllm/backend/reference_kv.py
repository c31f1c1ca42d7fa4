"""The reference backend's KV pool: float32, in blocks, resident only where written."""

from __future__ import annotations

import numpy as np

from localllm.errors import OutOfMemoryPlan
from localllm.spec import DecoderSpec
from localllm.spec.memory import kv_block_bytes


class KVPool:
    """K and V of every layer, a block holding all layers of its positions side by side.

    One zeroed numpy array of fixed size: the operating system backs a page of it only when a
    block there is first written, and rows are written in place, which an MLX array cannot do.
    """

    def __init__(self, spec: DecoderSpec, num_blocks: int, block_size: int) -> None:
        block_bytes = kv_block_bytes(spec, block_size)
        try:
            pool = np.zeros((num_blocks, block_bytes // 4), np.float32)
        except (MemoryError, ValueError) as error:
            raise OutOfMemoryPlan(
                f"a KV pool of {num_blocks} blocks of {block_bytes} bytes does not fit in memory",
                hint="ask for fewer KV blocks: a shorter context or fewer sequences at once",
            ) from error
        self.block_size = block_size
        self._keys: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        at = 0
        for layer in spec.layers:
            heads, size = layer.mixer.kv_heads, layer.mixer.head_dim
            for views in (self._keys, self._values):
                part = pool[:, at : at + block_size * heads * size]
                # [num_blocks, block_size, kv_heads, head_dim], a view into the pool
                views.append(part.reshape(num_blocks, block_size, heads, size))
                assert np.shares_memory(views[-1], pool)
                at += block_size * heads * size

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
