"""What training sees of the data: token ids, and which of them count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from localllm.train.data.report import DataReport


@dataclass(frozen=True, eq=False)
class Example:
    """tokens: int32 [n]; trained: bool [n], whether predicting tokens[i] from those before counts.

    trained[0] is always False: nothing comes before it. origin: "file:line".
    """

    tokens: np.ndarray
    trained: np.ndarray
    origin: str

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.trained.shape
        assert len(self.tokens) == 0 or not self.trained[0]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def targets(self) -> int:
        """How many tokens count."""
        return int(np.count_nonzero(self.trained))


@dataclass(frozen=True, eq=False)
class Preference:
    """Two answers to one prompt; each example holds the prompt and its answer, which is trained."""

    chosen: Example
    rejected: Example
    origin: str


@dataclass(frozen=True, eq=False)
class TrainingData:
    """train, valid: all of one type. fingerprint: hash of tokens and masks, in order."""

    train: tuple[Example, ...] | tuple[Preference, ...]
    valid: tuple[Example, ...] | tuple[Preference, ...]
    report: DataReport
    fingerprint: str
