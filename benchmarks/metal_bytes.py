"""Bytes between memory and chip: our Metal kernels, MLX's, and the least possible.

    python -m benchmarks.metal_bytes [--kernel NAME …] [--dtype float16] [--json FILE]

Both run in the emulator, which counts under one model: a cache of 768 KiB, cold at each dispatch.
MLX's kernels are those of the installed wheel, chosen as MLX chooses on an M4 Pro or Max. Where
part of MLX's way has no source in the wheel, that part counts as each input and output once, and
the figure is marked: MLX moves at least that. No GPU runs and nothing here is a speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from benchmarks.harness.table import markdown, write_json
from localllm.kernels_metal.emulator.measure import (
    contests_of,
    measure,
    measure_mlx,
)
from localllm.kernels_metal.emulator.mlx_costs import MlxCost
from localllm.kernels_metal.registry import KERNELS

HEADINGS = (
    *("kernel", "work", "least", "ours", "around", "MLX"),
    *("ours / least", "ours / MLX", "MLX's kernels"),
)


@dataclass(frozen=True)
class Row:
    """ours: bytes of our kernels' dispatches. around: of MLX's ops before and after them, which the
    comparison with MLX includes. mlx: bytes, or None where MLX has no way; `mlx_at_least` where
    not all of it was measured."""

    kernel: str
    work: str
    least: int
    ours: int
    around: int
    mlx: int | None
    mlx_at_least: bool
    mlx_kernels: str
    right: bool

    def cells(self) -> list[str]:
        around = f"{self.around:,}" if self.around else ""
        first = [self.kernel, self.work, f"{self.least:,}", f"{self.ours:,}", around]
        to_least = f"{self.ours / self.least:.3f}"
        if self.mlx is None:
            return [*first, "none", to_least, "", ""]
        more, less = ("≥ ", "≤ ") if self.mlx_at_least else ("", "")
        ratio = f"{less}{(self.ours + self.around) / self.mlx:.3f}"
        return [*first, f"{more}{self.mlx:,}", to_least, ratio, self.mlx_kernels]


def rows(kernel: str, dtype: mx.Dtype) -> Iterator[Row]:
    """Every contest of a kernel; none where the kernel does not exist."""
    for contest in contests_of(kernel, dtype) or []:
        ours, mlx = measure(contest), measure_mlx(contest)
        yield Row(
            contest.kernel,
            contest.work,
            contest.least_bytes,
            ours.moved,
            ours.around,
            mlx.moved if mlx else None,
            bool(mlx) and not mlx.measured,
            _named(mlx) if mlx else "",
            ours.right,
        )


def _named(mlx: MlxCost) -> str:
    named = [step.name for step in mlx.steps if step.measured]
    others = sum(not step.measured for step in mlx.steps)
    return " + ".join([*named, *([f"{others} other"] if others else [])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for kernel in options.kernel:
        if contests_of(kernel, getattr(mx, options.dtype)) is None:
            print(f"{kernel}: no such kernel yet", file=sys.stderr)
            continue
        for row in rows(kernel, getattr(mx, options.dtype)):
            found.append(row)
            print(f"{kernel}: {row.work}", file=sys.stderr, flush=True)
    print(markdown(HEADINGS, [row.cells() for row in found]))
    write_json(options.json, found)
    wrong = [row for row in found if not row.right]
    for row in wrong:
        print(f"WRONG RESULT: {row.kernel}, {row.work}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
