"""What a measurement found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from localllm.measure.timing import Figure

Work = Literal["prefill", "decode", "batch", "verify"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    size: prompt tokens, sequences at once, or drafted tokens; 1 for decode.
    context: positions that the last row sees. tokens: computed in one piece of work.
    seconds: of one piece of work. relative: to a decode step at the same context.
    token_bytes: weights and KV that one decoded token reads. share: those against what the
    measured bandwidth could have read in that time; both None where they say nothing.
    """

    work: Work
    size: int
    context: int
    tokens: int
    seconds: Figure
    relative: float | None = None
    token_bytes: int | None = None
    share: float | None = None

    @property
    def rate(self) -> float:
        """Tokens per second, of the median."""
        return self.tokens / self.seconds.median

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens per second of the slowest and of the fastest round."""
        return self.tokens / self.seconds.high, self.tokens / self.seconds.low


@dataclass(frozen=True)
class LeftOut:
    what: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Sizes in bytes, times in seconds, bandwidth in bytes per second.

    load_seconds: from a model on disk to one that can answer. first_token_seconds: those, and the
    first step over a prompt of a few tokens.
    resident: of the whole process once loaded, at its highest until then, and at the end; None
    where the system does not tell. kv_bytes: reserved for kv_tokens positions, taken when used.
    bandwidth: read by as many threads as compute, from `bandwidth_bytes` of memory.
    """

    model: str
    backend: str
    kernels: str | None
    threads: int | None
    activations: str
    processor: str
    cores: tuple[int, int]  # usable, installed
    versions: dict[str, str]
    load_seconds: float
    first_token_seconds: float
    from_cache: bool
    resident: tuple[int | None, int | None, int | None]
    weight_bytes: int
    kv_bytes: int
    kv_tokens: int
    bandwidth: float | None
    bandwidth_bytes: int | None
    rows: list[Row]
    left_out: list[LeftOut]
    warnings: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON; rates are given beside the times."""
        rows = [
            {**asdict(row), "tokens_per_second": row.rate, "tokens_per_second_range": row.rates}
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows}
