"""Notices a run that has gone wrong: numbers that are none, and losses that run away."""

from __future__ import annotations

import math
from dataclasses import dataclass

_MEMORY = 0.9  # of the running mean: some ten steps
_EARLY = 20  # steps before a rise means anything


@dataclass
class Guard:
    """smoothed: running mean of the loss; lowest: its lowest so far. Part of a checkpoint."""

    smoothed: float | None = None
    lowest: float = math.inf
    seen: int = 0

    def check(self, loss: float, norm: float) -> str | None:
        """Why the run must stop before this step's gradient is used; None if all is well."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm} (the loss {loss:.4g})"
        before = loss if self.smoothed is None else self.smoothed
        self.smoothed = _MEMORY * before + (1 - _MEMORY) * loss
        self.seen += 1
        self.lowest = min(self.lowest, self.smoothed)
        if self.seen > _EARLY and self.smoothed > 3 * abs(self.lowest) + 1:
            return f"the loss runs away: {self.smoothed:.4g} on average, {self.lowest:.4g} before"
        return None

    def facts(self) -> dict[str, float | int | None]:
        lowest = None if math.isinf(self.lowest) else self.lowest
        return {"smoothed": self.smoothed, "lowest": lowest, "seen": self.seen}

    @classmethod
    def restored(cls, facts: dict[str, float | None]) -> Guard:
        lowest = facts["lowest"]
        return cls(
            facts["smoothed"], math.inf if lowest is None else lowest, int(facts["seen"] or 0)
        )
