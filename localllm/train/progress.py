"""How far a run has come, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localllm.train.guard import Guard
from localllm.train.runs import Run


@dataclass(frozen=True)
class Result:
    """How a run ended.

    status: "finished", "early-stop", "interrupted" (resume goes on), "diverged". reason: of the
    last two. loss: of the last step; valid_loss: of the last evaluation. best_step: where that was
    lowest. adapter: the folder of what was trained, None if nothing could be delivered.
    """

    status: str
    run: Run
    step: int
    steps: int
    loss: float | None
    valid_loss: float | None
    best_loss: float | None
    best_step: int | None
    adapter: Path | None
    reason: str | None = None


@dataclass
class Progress:
    """What a run knows beside its arrays. All of it is in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    valid_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    worse: int = 0  # evaluations in a row without a new best
    guard: Guard = field(default_factory=Guard)

    def facts(self) -> dict[str, Any]:
        return {**vars(self), "guard": self.guard.facts()}

    @classmethod
    def restored(cls, facts: Mapping[str, Any]) -> Progress:
        return cls(**{**facts, "guard": Guard.restored(facts["guard"])})
