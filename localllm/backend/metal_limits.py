"""Memory limits on a Mac, so that no model can starve the system.

The GPU shares the machine's memory. macOS states how much of it a process should have resident
for the GPU at a time; beyond that the system swaps, stalls and may panic. MLX's advice
(https://ml-explore.github.io/mlx/build/html/python/memory_management.html) is to wire what a model
needs, below that figure, and to bound the allocator.
"""

from __future__ import annotations

import mlx.core as mx

_CACHE = 256 << 20  # freed buffers that MLX may keep for reuse


def working_set() -> int | None:
    """Bytes that macOS recommends to keep resident for the GPU; None where there is no GPU."""
    if not mx.metal.is_available():
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


def bound_memory(needed: int) -> None:
    """Wires `needed` bytes, at most the recommended working set, and bounds MLX's allocator by it.

    What the planner let through fits; an allocation beyond the limit waits for running work and
    then fails, instead of pushing the system into swap. Does nothing where there is no GPU.
    """
    most = working_set()
    if most is None:
        return
    mx.set_cache_limit(_CACHE)
    mx.set_memory_limit(most)
    mx.set_wired_limit(min(needed, most))
