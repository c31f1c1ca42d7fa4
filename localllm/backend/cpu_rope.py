"""cos/sin tables for the native engine: by position where that suffices, else by row."""

from __future__ import annotations

import numpy as np

from localllm.spec import RopeSpec
from localllm.spec.rope import tables

_FIRST_POSITIONS = 1024


class RopeTable:
    """Answers a step's rows with (table, index): row r uses table[index[r]] = cos | sin."""

    def __init__(self, rope: RopeSpec) -> None:
        self._rope = rope
        self._by_length = rope.kind in ("dynamic", "longrope")
        self._table = np.zeros((0, rope.dim), np.float32)

    def rows(self, positions: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """positions, lengths: int32 [n]. Returns float32 [t, dim] and int32 [n]."""
        if self._by_length:
            table = np.concatenate(tables(self._rope, positions, lengths), axis=1)
            return table, np.arange(len(positions), dtype=np.int32)
        needed = int(positions.max()) + 1
        if needed > len(self._table):
            self._grow(max(needed, 2 * len(self._table), _FIRST_POSITIONS))
        return self._table, positions

    def _grow(self, size: int) -> None:
        new = np.arange(len(self._table), size)
        grown = np.concatenate(tables(self._rope, new, np.zeros_like(new)), axis=1)
        self._table = np.concatenate((self._table, grown))
