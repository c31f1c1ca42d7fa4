"""What an evaluation found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from localllm.eval.divergence import Divergence


@dataclass(frozen=True)
class Perplexity:
    """Over all predicted tokens. loss: nats a token; error: its standard error."""

    texts: int
    tokens: int
    loss: float
    error: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@dataclass(frozen=True)
class Choices:
    """correct: by the sum of a choice's log-probabilities; normalized: by that per byte of text."""

    count: int
    correct: int
    normalized: int


@dataclass(frozen=True)
class Matches:
    count: int
    correct: int


@dataclass(frozen=True)
class EvalReport:
    """Parts are None where the file asked for none of the kind."""

    model: str
    adapter: str | None
    perplexity: Perplexity | None = None
    choices: Choices | None = None
    matches: Matches | None = None
    divergence: Divergence | None = None

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        if self.perplexity is not None:
            found["perplexity"]["perplexity"] = self.perplexity.perplexity
        for name, part in (("choices", self.choices), ("matches", self.matches)):
            if part is not None:
                found[name]["accuracy"] = part.correct / part.count
        return found
