"""The lengths of rows that DoRA needs, kept beside an adapter so that they are computed once.

FOLDER/dora_lengths.f32 holds 32 bytes that say what they are of (the base's content, the adapter's
matrices and scales), the sha256 of the rest, and the rest: float32 [out] of each target in the
order of their names. A file that does not fit to the byte is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from localllm.adapters.lora import LowRank, make_adapter
from localllm.checkpoint.atomic import write_bytes
from localllm.errors import CheckpointError

LENGTHS = "dora_lengths.f32"
_DIGEST = 32  # bytes


class KeptLengths:
    """The file at `path` for adapters `pairs` on a base with that digest of its content."""

    def __init__(self, path: Path, pairs: Mapping[str, LowRank], base: bytes) -> None:
        self._path = path
        self._rows = {target: pairs[target].b.shape[0] for target in sorted(pairs)}
        self._of = hashlib.sha256(base + make_adapter("", pairs).digest).digest()

    def read(self) -> dict[str, np.ndarray] | None:
        """float32 [out] of each target; None unless they are there, and of these very weights."""
        size = 2 * _DIGEST + 4 * sum(self._rows.values())
        try:
            if self._path.stat().st_size != size:
                return None
            data = self._path.read_bytes()
        except OSError:
            return None
        of, digest, values = data[:_DIGEST], data[_DIGEST : 2 * _DIGEST], data[2 * _DIGEST :]
        if of != self._of or digest != hashlib.sha256(values).digest():
            return None
        edges = np.cumsum(list(self._rows.values()))[:-1]
        parts = np.split(np.frombuffer(values, "<f4").astype(np.float32), edges)
        return dict(zip(self._rows, parts, strict=True))

    def write(self, lengths: Mapping[str, np.ndarray]) -> None:
        """All or nothing; nothing where the folder cannot be written."""
        values = b"".join(lengths[target].astype("<f4").tobytes() for target in self._rows)
        with contextlib.suppress(CheckpointError):
            write_bytes(self._path, self._of + hashlib.sha256(values).digest() + values)
