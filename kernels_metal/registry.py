"""Every kernel there is, and all the work on which they compete with MLX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module

import mlx.core as mx

from localllm.kernels_metal.contest import Contest

KERNELS = (
    "paged_decode",
    "paged_prefill",
    "qmv",
    "qmm_small",
    "lora",
    "rms_norm",
    "rope_kv",
    "sample_tokens",
    "causal_conv",
    "gated_delta",
)
DTYPES = (mx.float16, mx.bfloat16)


def all_contests(
    dtypes: Sequence[mx.Dtype] = DTYPES, kernels: Sequence[str] = KERNELS
) -> Iterator[Contest]:
    """One at a time: each holds the arrays of its work."""
    for name in kernels:
        module = import_module(f"localllm.kernels_metal.{name}")
        for dtype in dtypes:
            yield from module.contests(dtype)
