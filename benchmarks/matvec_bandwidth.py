"""A 4-bit matrix times one vector, alone, against the read bandwidth measured in the same run.

    python -m benchmarks.matvec_bandwidth [--rounds 9] [--kernels NAME] [--json FILE]

Every call takes the next of many copies of the matrix, together far larger than the caches, so each
weight comes from memory. Bytes are those that the format needs (codes, scales and offsets), not
what packing makes of them. The kernel runs on one thread; for two, two processes run it at once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness.machine import print_heading, read_bandwidth
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from benchmarks.harness.worker import Worker
from localllm.backend.cpu import choose_kernels
from localllm.backend.cpu_weights import add_matrix
from localllm.checkpoint.tensor import Affine, GroupValues
from localllm.kernels_cpu import _native

SHAPES = ((49_152, 576), (8_192, 2_048))
GROUP = 32
COPIES_BYTES = 320 << 20  # ten times a large last-level cache
GOAL = Goal(0.9)


class Matvec:
    """Copies of one random 4-bit matrix; `sweep` multiplies each by a vector."""

    def __init__(self, rows: int, columns: int, *, offsets: bool, kernels: str) -> None:
        random = np.random.default_rng(2)
        codes = random.integers(0, 1 << 32, (rows, columns // 8), np.uint32)
        scales = GroupValues(random.random((rows, columns // GROUP)).astype(np.float16))
        biases = GroupValues(-8 * scales.values) if offsets else None
        matrix = Affine(codes, 4, GROUP, scales, biases, zero_point=0 if offsets else 8)
        self._nbytes = matrix.nbytes
        self._names = [f"copy{i}" for i in range(max(2, COPIES_BYTES // matrix.nbytes))]
        self._store = _native.WeightStore()
        for name in self._names:
            add_matrix(self._store, name, matrix)
        self._x = random.standard_normal((1, columns)).astype(np.float32)
        self._out = np.empty((1, rows), np.float32)
        self._kernels = kernels
        self.sweep()  # brings every page in

    def sweep(self, seconds: float = 0.0) -> float:
        """Bytes a second over all copies, once or again until `seconds` are over."""
        start, calls = time.perf_counter(), 0
        while True:
            for name in self._names:
                _native.matmul(self._store, name, self._x, self._out, self._kernels)
                calls += 1
                now = time.perf_counter()
                if seconds and now - start >= seconds:
                    return calls * self._nbytes / (now - start)
            if not seconds:
                return calls * self._nbytes / (now - start)


@dataclass(frozen=True)
class Row:
    """Bytes a second. share: of the read bandwidth of as many threads."""

    shape: str
    kind: str
    threads: int
    matvec: float
    read: float
    share: float


def measure(shape: tuple[int, int], offsets: bool, threads: int, args: argparse.Namespace) -> Row:
    workers = [
        Worker(Matvec, *shape, offsets=offsets, kernels=args.kernels) for _ in range(threads)
    ]
    ours, read = [], []
    for _ in range(args.rounds):
        read.append(read_bandwidth(threads, rounds=1))
        for worker in workers:
            worker.start("sweep", 0.15)
        ours.append(sum(worker.result() for worker in workers))
    for worker in workers:
        worker.close()
    matvec, bandwidth = statistics.median(ours), statistics.median(read)
    return Row(
        f"{shape[0]} x {shape[1]}",
        "Q4_1" if offsets else "Q4_0",
        threads,
        matvec,
        bandwidth,
        matvec / bandwidth,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kernels", help="an instruction set; the best unless told")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.kernels = choose_kernels(args.kernels)
    print_heading()
    print(f"kernels: {args.kernels}; medians of {args.rounds} rounds in turn\n")
    rows = [
        measure(shape, offsets, threads, args)
        for shape in SHAPES
        for offsets in (True, False)
        for threads in args.threads
    ]
    header = ("matrix", "format", "threads", "GB/s", "read GB/s", "share", "wanted", "reached")
    shown = [
        [
            row.shape,
            row.kind,
            str(row.threads),
            f"{row.matvec / 1e9:.1f}",
            f"{row.read / 1e9:.1f}",
            f"{row.share:.0%}",
            wanted(GOAL, ""),
            verdict(row.share, GOAL),
        ]
        for row in rows
    ]
    print(markdown(header, shown))
    write_json(args.json, rows, kernels=args.kernels)


if __name__ == "__main__":
    main()
