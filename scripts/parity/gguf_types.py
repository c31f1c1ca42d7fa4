"""Parity of the GGUF readers: our weights against the `gguf` package's own dequantization."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import gguf
import numpy as np

from localllm import hub
from localllm.checkpoint import open_checkpoint
from tests.checkpoint.files import HALVES, random_blocks, write_gguf

TITLE = "GGUF block formats"
NOTE = (
    "Weights read here against those of the `gguf` package, on random blocks and on every tensor "
    "of the real models. `0` is bit for bit."
)
HEADER = ("Type", "Weights compared", "Largest difference", "Tensors of real models compared")
MODELS = ("smollm2:135m", "gemma3:270m")


def rows() -> list[tuple[str, ...]]:
    compared, worst, tensors = Counter[str](), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for kind in HALVES:
            raw = random_blocks(kind, rows=64, blocks=32)
            path = write_gguf(Path(folder) / f"{kind}.gguf", {"w": (raw, kind)})
            _compare(path, compared, worst)
    for name in MODELS:
        tensors += _compare(hub.resolve(name).path, compared, worst)
    return [
        (kind, f"{compared[kind]:,}", f"{worst[kind]:g}", str(tensors[kind])) for kind in compared
    ]


def _compare(path: Path, compared: Counter[str], worst: Counter[str]) -> Counter[str]:
    """Adds to the counts of each type; returns how many tensors of each were compared."""
    tensors = Counter[str]()
    with_ours = open_checkpoint(path)
    for theirs in gguf.GGUFReader(path).tensors:
        kind = theirs.tensor_type.name
        expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        got = with_ours.tensor(theirs.name).to_float32()
        compared[kind] += got.size
        worst[kind] = max(worst[kind], float(np.abs(got - expected).max()))  # type: ignore[assignment]
        tensors[kind] += 1
    with_ours.close()
    return tensors
