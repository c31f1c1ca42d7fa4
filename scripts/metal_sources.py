"""Writes every complete Metal source that MLX would compile for our kernels.

    python -m scripts.metal_sources FOLDER

One file for each kernel, dtype and set of template arguments among the contests of the kernels:
MLX's own preamble, then exactly the text that MLX generates, traced without a GPU. Apple's compiler
takes them as they are: xcrun metal -std=metal3.1 -c FILE.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import mlx.core as mx

from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.emulator.measure import contests_of
from localllm.kernels_metal.emulator.mlx_sources import mlx_version, preamble
from localllm.kernels_metal.emulator.trace import generated
from localllm.kernels_metal.kernel import Launch, MetalKernel, executed_by
from localllm.kernels_metal.registry import KERNELS

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


class Tracing:
    """Keeps the source of each kernel that is called; outputs are zeros."""

    def __init__(self) -> None:
        self.sources: dict[str, tuple[str, str]] = {}
        self.work = ""

    def execute(self, kernel: MetalKernel, launch: Launch) -> list[mx.array]:
        text = generated(kernel.built, launch)
        key = hashlib.sha256(text.encode()).hexdigest()[:10]
        arguments = ", ".join(f"{name} = {_spelled(value)}" for name, value in launch.template)
        about = f"// {kernel.name}, MLX {mlx_version()}, for: {self.work}\n// {arguments}\n"
        self.sources.setdefault(f"{kernel.name}_{key}", (about, text))
        return [
            mx.zeros(shape, dtype)
            for shape, dtype in zip(launch.output_shapes, launch.output_dtypes, strict=True)
        ]


def _spelled(value: object) -> str:
    return str(value).removeprefix("mlx.core.")


def trace(contests: list[Contest], tracing: Tracing, dtype: str) -> None:
    for contest in contests:
        tracing.work = f"{contest.work} ({dtype})"
        with executed_by(tracing):
            mx.eval(contest.ours())


def main(folder: str) -> int:
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    total = 0
    for kernel in KERNELS:
        tracing = Tracing()
        for dtype, kind in DTYPES.items():
            trace(contests_of(kernel, kind) or [], tracing, dtype)
        for name, (about, text) in tracing.sources.items():
            whole = about + preamble() + "\n" + text + "\n"
            (place / f"{name}.metal").write_text(whole, encoding="utf-8")
        print(f"{kernel}: {len(tracing.sources)} sources")
        total += len(tracing.sources)
    print(f"{total} sources in {place}")
    return 0 if total else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
