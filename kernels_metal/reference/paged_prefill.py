"""What `paged_prefill` computes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from localllm.kernels_metal.paged_pool import Pool
from localllm.kernels_metal.reference.paged_decode import paged_decode
from localllm.kernels_metal.reference.paged_pool import Float64


def paged_prefill(
    q: mx.array,
    keys: Pool,
    values: Pool,
    tables: mx.array,
    row_offsets: NDArray[np.int32],
    starts: NDArray[np.int32],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
) -> Float64:
    """[rows, heads, head_dim], from the same arguments: each row by itself."""
    counts = np.diff(row_offsets)
    chunk = np.repeat(np.arange(len(starts)), counts)
    lengths = np.concatenate(
        [start + 1 + np.arange(count) for start, count in zip(starts, counts, strict=True)]
    ).astype(np.int32)
    return paged_decode(
        q, keys, values, mx.array(np.array(tables)[chunk]), mx.array(lengths),
        scale=scale, window=window, softcap=softcap, sinks=sinks,
    )  # fmt: skip
