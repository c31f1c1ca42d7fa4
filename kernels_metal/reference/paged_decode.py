"""What `paged_decode` computes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.paged_pool import Pool
from localllm.kernels_metal.reference.paged_pool import (
    Float64,
    as_float64,
    attention,
    pool_values,
    sequence,
)


def paged_decode(
    q: mx.array,
    keys: Pool,
    values: Pool,
    tables: mx.array,
    lengths: mx.array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
) -> Float64:
    """[n, heads, head_dim], from the same arguments."""
    rows, all_keys, all_values = as_float64(q), pool_values(keys), pool_values(values)
    table, last = np.array(tables), np.array(lengths)
    sink = None if sinks is None else as_float64(sinks)
    out = []
    for i, row in enumerate(rows):
        first = 0 if window is None else max(0, int(last[i]) - window)
        key = sequence(all_keys, table[i], first, int(last[i]))
        value = sequence(all_values, table[i], first, int(last[i]))
        out.append(attention(row, key, value, scale=scale, softcap=softcap, sinks=sink))
    return np.stack(out)
