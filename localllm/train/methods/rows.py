"""Examples laid end to end as rows: the last token of each is a target alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from localllm.train.methods.protocol import MethodRows
from localllm.train.program import Rows


class Tokens(Protocol):
    """What a method looks at of an example; see `localllm.train.data.example`."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def trained(self) -> np.ndarray: ...


class Pair(Protocol):
    @property
    def chosen(self) -> Tokens: ...
    @property
    def rejected(self) -> Tokens: ...


def lay_out(examples: Sequence[Tokens], first_row: int) -> MethodRows:
    """One sequence an example, of one row less than it has tokens (an empty one for a lone token).

    Row i sees tokens up to i and its target is token i + 1, counted where that is trained.
    """
    sizes = [max(0, len(example.tokens) - 1) for example in examples]
    rows = Rows(
        np.concatenate([np.zeros(0, np.int32), *(e.tokens[:-1] for e in examples)], dtype=np.int32),
        np.concatenate([np.zeros(0, np.int32), *(e.tokens[1:] for e in examples)], dtype=np.int32),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
        first_row,
    )
    counted = np.concatenate([np.zeros(0, bool), *(e.trained[1:] for e in examples)])
    return MethodRows(rows, counted.astype(bool))


def answers(batch: MethodRows) -> list[np.ndarray]:
    """The counted rows of each sequence."""
    edges = batch.rows.offsets
    return [first + np.flatnonzero(batch.counted[first:last]) for first, last in pairwise(edges)]


def pairs_laid_out(pairs: Sequence[Pair], first_row: int) -> MethodRows:
    """Two sequences a pair, the chosen one first."""
    return lay_out([side for pair in pairs for side in (pair.chosen, pair.rejected)], first_row)
