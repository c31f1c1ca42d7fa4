"""Saving and loading KV blocks of SmolLM2's size, from the page cache, and what checksums cost.

    python benchmarks/disk_cache.py

Loads are the fastest of 10 rounds of 125 blocks (92 MB). Saves are not synced, as in use.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from localllm.engine.disk_cache import DiskCache

BLOCKS, BLOCK_BYTES, ROUNDS = 125, 737_280, 10
CHECKSUMS: dict[str, Callable[[np.ndarray], object]] = {
    "crc32": zlib.crc32,
    "adler32": zlib.adler32,
    "sha256": lambda data: hashlib.sha256(data).digest(),
    "blake2b": lambda data: hashlib.blake2b(data).digest(),
}


def fastest(work: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    data = np.random.default_rng(0).integers(0, 256, (BLOCKS, BLOCK_BYTES), dtype=np.uint8)
    for name, checksum in CHECKSUMS.items():
        rate = BLOCK_BYTES / fastest(lambda checksum=checksum: checksum(data[0])) / 1e9
        print(f"{name:<22}{rate:>8.2f} GB/s")
    digests = [hashlib.sha256(b"%d" % i).digest() for i in range(BLOCKS)]
    into = np.zeros_like(data)
    wanted = list(zip(digests, into, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        cache = DiskCache(Path(folder), limit_bytes=1 << 30, block_bytes=BLOCK_BYTES)
        start = time.perf_counter()
        saved = [cache.save(*block) for block in zip(digests, data, strict=True)]
        took = time.perf_counter() - start
        assert all(saved), cache.note
        print(f"{'save':<22}{took / BLOCKS * 1e3:>8.2f} ms a block")
        one = fastest(lambda: [cache.load(*block) for block in wanted])
        many = fastest(lambda: cache.load_many(wanted))
        assert (into == data).all()
        print(f"{'load one by one':<22}{one * 1e3:>8.1f} ms")
        print(f"{'load_many':<22}{many * 1e3:>8.1f} ms")
        cache.close()


if __name__ == "__main__":
    main()
