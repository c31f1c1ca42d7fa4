"""Experts that stay on disk: which are in memory, and what that does to the speed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localllm.kernels_cpu import _native

# What products with one row reach of the memory's bandwidth (docs/performance.md: 80 to 94 %).
_OF_BANDWIDTH = 0.85
_PROBE_BYTES = 96 << 20
_MAX_FILE = 16 << 20
_MOST_USES = 1000  # remembered of an expert, on the average
_ENOUGH_STEPS = 32  # that tell how fast a model decodes
_ALIKE = 0.02  # of the experts in memory, that may be more or fewer than in the run before


@dataclass(frozen=True)
class ExpertUse:
    """in_memory of `experts` in all mixtures together; chosen: how many steps asked for, read: how
    many of those came from disk.

    expected_speed: tokens a second that one sequence decodes at: what it did in the last run like
    this one, else if experts are chosen as often as in earlier runs; where there were none (`known`
    is False), if all are chosen alike, which is slower than real routers make it.
    """

    in_memory: int
    experts: int
    expected_speed: float
    known: bool
    chosen: int = 0
    read: int = 0

    def note(self) -> str:
        speed = f"{self.expected_speed:.3g} tokens/s"
        expect = f"expect some {speed}" if self.known else f"expect at least {speed}"
        return (
            f"{self.in_memory} of {self.experts} experts are in memory, the others are read from "
            f"disk when they are chosen: {expect}"
        )


def expected_speed(
    token_bytes: int,
    expert_token_bytes: int,
    share: float,
    memory_speed: float,
    read_speed: float,
) -> float:
    """Tokens a second of one sequence: all of `token_bytes` come from memory, and those of experts
    before from disk, save for the `share` that is in memory. Speeds in bytes a second."""
    seconds = token_bytes / memory_speed + (1 - share) * expert_token_bytes / read_speed
    return 1 / seconds


def memory_speed(threads: int) -> float:
    """Bytes a second that products with one row take from memory."""
    return _OF_BANDWIDTH * float(_native.read_bandwidth(_PROBE_BYTES, threads))


def read_speed(file: Path, piece: int) -> float:
    """Bytes a second of reading pieces here and there in a file, from its disk where the system
    forgets its pages when asked (Linux)."""
    size = file.stat().st_size
    piece = min(piece, size)
    draw = random.Random(1)
    handle = os.open(file, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        done, start = 0, time.perf_counter()
        while done < min(_PROBE_BYTES, size):
            done += len(os.pread(handle, piece, draw.randrange(size - piece + 1)))
        return done / (time.perf_counter() - start)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Past:
    """What earlier runs of a model left.

    uses: how often each expert was chosen; empty where nothing is known. speed: tokens a second at
    which the last run decoded one sequence, with `in_memory` experts and `threads`; 0: unknown.
    """

    uses: list[float]
    speed: float = 0.0
    in_memory: int = 0
    threads: int = 0

    def speed_with(self, in_memory: int, threads: int) -> float:
        """0 where the last run was another."""
        alike = abs(in_memory - self.in_memory) <= _ALIKE * in_memory and threads == self.threads
        return self.speed if alike else 0.0


@dataclass
class Decoding:
    """Steps of one row, and what they took."""

    steps: int = 0
    seconds: float = 0.0

    def record(self, seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds

    @property
    def speed(self) -> float:
        """Tokens a second; 0 while there were too few."""
        return self.steps / self.seconds if self.steps >= _ENOUGH_STEPS else 0.0


def measured_use(
    cache: _native.ExpertCache, past: Past, threads: int, token_bytes: int, expert_token_bytes: int
) -> ExpertUse:
    """With the speeds of disk and memory as they were measured when the cache was filled, unless
    the last run tells."""
    if speed := past.speed_with(cache.slots, threads):
        return ExpertUse(cache.slots, cache.experts, speed, known=True)
    uses = past.uses
    total = math.fsum(uses)
    known = total > 0
    share = cache.slots / cache.experts
    if known:
        pairs = zip(uses, cache.residents, strict=True)
        share = math.fsum(use for use, resident in pairs if resident) / total
    from_memory = _OF_BANDWIDTH * cache.memory_speed
    speed = expected_speed(token_bytes, expert_token_bytes, share, from_memory, cache.read_speed)
    return ExpertUse(cache.slots, cache.experts, speed, known)


def read_past(path: Path, count: int) -> Past:
    """Of `count` experts; knows nothing where there is nothing sound."""
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError, RecursionError):
        if path.stat().st_size <= _MAX_FILE:
            found = json.loads(path.read_text())
            past = Past(
                [float(n) for n in found["uses"]],
                float(found.get("speed", 0.0)),
                int(found.get("in_memory", 0)),
                int(found.get("threads", 0)),
            )
            if len(past.uses) == count and all(0 <= n < 1e18 for n in (*past.uses, past.speed)):
                return past
    return Past([])


def merged_uses(before: Sequence[float], now: Sequence[int]) -> list[float]:
    """Of earlier runs and this one; what is long ago fades as the sum stays bounded."""
    uses = (
        [old + new for old, new in zip(before, now, strict=True)] if before else [*map(float, now)]
    )
    scale = min(1.0, _MOST_USES * len(uses) / max(1.0, math.fsum(uses)))
    return [round(n * scale, 3) for n in uses]
