"""The text that MLX would hand to Metal's compiler, asked of MLX itself.

Inside `mx.export_function` a call of a `metal_kernel` is traced even where there is no Metal, and
`verbose=True` prints what was generated.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from localllm.kernels_metal.kernel import Launch

_FENCE = "```\n"


def generated(built: Any, launch: Launch) -> str:
    """built: what `mx.fast.metal_kernel` returned. Without the preamble that MLX puts before it.

    Raises ValueError or whatever MLX raises for a call that it refuses. Standard output is taken
    over for as long as it takes; no other thread should print.
    """

    def call(*inputs: mx.array) -> list[mx.array]:
        outputs: list[mx.array] = built(
            inputs=list(inputs),
            template=list(launch.template),
            grid=launch.grid,
            threadgroup=launch.threadgroup,
            output_shapes=[tuple(shape) for shape in launch.output_shapes],
            output_dtypes=list(launch.output_dtypes),
            init_value=launch.init_value,
            verbose=True,
        )
        return outputs

    sys.stdout.flush()
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryDirectory() as folder:
        kept = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(str(Path(folder) / "kernel.mlxfn"), call, *launch.inputs)
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
        printed.seek(0)
        text = printed.read().decode()
    start, end = text.find(_FENCE), text.rfind("\n```")
    if start < 0 or end < start:
        raise ValueError(f"MLX {mx.__version__} printed no source: {text[:200]!r}")
    return text[start + len(_FENCE) : end]
