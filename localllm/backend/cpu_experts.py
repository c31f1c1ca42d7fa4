"""Experts that stay on disk: how many are in memory, and what that does to the speed."""

from __future__ import annotations

from dataclasses import dataclass

from localllm.kernels_cpu import _native

# What products with one row reach of the memory's bandwidth (docs/performance.md: 80 to 94 %).
_OF_BANDWIDTH = 0.85
_PROBE_BYTES = 64 << 20


@dataclass(frozen=True)
class ExpertUse:
    """in_memory of `experts` in all mixtures together; chosen: how many steps asked for, read: how
    many of those came from disk.

    expected_speed: tokens a second that one sequence decodes at, were every expert as likely.
    Real routers prefer some, which then stay in memory: it is a lower bound for them.
    """

    in_memory: int
    experts: int
    expected_speed: float
    chosen: int = 0
    read: int = 0

    def note(self) -> str:
        return (
            f"{self.in_memory} of {self.experts} experts are in memory, the others are read from "
            f"disk when they are chosen: expect some {self.expected_speed:.3g} tokens/s"
        )


def expected_speed(
    token_bytes: int,
    expert_token_bytes: int,
    share: float,
    memory_speed: float,
    read_speed: float,
) -> float:
    """Tokens a second of one sequence: all of `token_bytes` come from memory, and those of experts
    that are not among the `share` in memory from disk before. Speeds in bytes a second."""
    seconds = token_bytes / memory_speed + (1 - share) * expert_token_bytes / read_speed
    return 1 / seconds


def measured_use(
    cache: _native.ExpertCache, token_bytes: int, expert_token_bytes: int, threads: int
) -> ExpertUse:
    """With the disk's speed as filling the cache showed it, and the memory's measured now."""
    memory_speed = _OF_BANDWIDTH * _native.read_bandwidth(_PROBE_BYTES, threads)
    share = cache.slots / cache.experts
    speed = expected_speed(
        token_bytes, expert_token_bytes, share, memory_speed, cache.read_speed
    )
    return ExpertUse(cache.slots, cache.experts, speed)
