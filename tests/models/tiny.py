"""Tiny random checkpoints, the same on every machine and without torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Shapes = Mapping[str, "tuple[int, ...] | list[int]"]


def random_tensors(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 values that depend on seed, name and shape alone."""
    return {name: _tensor(name, tuple(shape), seed) for name, shape in shapes.items()}


def random_tokens(count: int, vocab: int, seed: int = 0) -> list[int]:
    return (_raw(f"{seed}:tokens", count) % np.uint64(vocab)).astype(int).tolist()


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Path:
    """A folder as the hub has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    # Raw bits, since numpy may change what its distributions draw from a seed.
    bits = _raw(f"{seed}:{name}", math.prod(shape)) >> np.uint64(40)
    unit = (bits.astype(np.float32) / np.float32(1 << 23) - 1).reshape(shape)  # [-1, 1)
    if len(shape) == 1:
        gain = np.float32(0.3) * unit
        return gain if name.endswith("bias") else 1 + gain
    if "embed" in name or "wte" in name or "wpe" in name:
        return unit
    return unit * np.float32(2.5 / math.sqrt(shape[-1]))


def _raw(key: str, count: int) -> np.ndarray:
    digest = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.Philox(key=digest).random_raw(count)
