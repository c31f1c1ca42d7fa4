"""Random paged KV for contests and tests: what a running engine's pool may look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from localllm.kernels_metal.paged_pool import Pool
from localllm.kernels_metal.reference.paged_pool import quantized


@dataclass(frozen=True)
class PagedKV:
    """lengths: positions of each sequence. seen_from: the first that any row sees."""

    keys: Pool
    values: Pool
    tables: NDArray[np.int32]  # [sequences, max_blocks]; -1 where nothing is to be looked at
    lengths: tuple[int, ...]
    seen_from: tuple[int, ...]


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    return mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)


def paged_kv(
    rng: np.random.Generator,
    lengths: Sequence[int],
    *,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    bits: int,
    dtype: mx.Dtype,
    seen_from: Sequence[int] | None = None,
    spare: float = 0.0,
) -> PagedKV:
    """Sequences of random KV in blocks that lie in no order, among a few that belong to nobody.

    spare: the value of whatever is not a position of a sequence that may be seen; NaN shows a
    kernel that lets it in. The value stands for scales and biases where the pool is quantized.
    """
    first = [0] * len(lengths) if seen_from is None else list(seen_from)
    width = max(-(-length // block_size) for length in lengths)
    used = [
        (i, block)
        for i, length in enumerate(lengths)
        for block in range(first[i] // block_size, -(-length // block_size))
    ]
    blocks = len(used) + 2
    ids = rng.permutation(blocks)[: len(used)]
    tables = np.full((len(lengths), width), -1, np.int32)
    live = np.zeros((blocks, 1, block_size, 1), bool)
    for (i, block), where in zip(used, ids, strict=True):
        tables[i, block] = where
        positions = block * block_size + np.arange(block_size)
        live[where, 0, :, 0] = (positions >= first[i]) & (positions < lengths[i])

    def pool() -> Pool:
        values = rng.standard_normal((blocks, kv_heads, block_size, head_dim), dtype=np.float32)
        marked = mx.array(live)
        empty = mx.array(spare, dtype=dtype)
        if not bits:
            return mx.where(marked, mx.array(values).astype(dtype), empty)
        made = quantized(values, bits, dtype)
        return type(made)(
            made.codes,
            mx.where(marked, made.scales, empty),
            mx.where(marked, made.biases, empty),
            bits,
        )

    keys, values = pool(), pool()
    return PagedKV(keys, values, tables, tuple(lengths), tuple(first))
