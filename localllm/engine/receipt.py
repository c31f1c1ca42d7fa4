"""What a request cost, given with every result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Receipt:
    """Times are seconds; rates are tokens per second, None where nothing was timed.

    generated_tokens: those of the answer; a drawn end-of-sequence token is not one of them.
    queue_time: from arrival to the first step it was part of.
    time_to_first_token: from arrival to the first token, None if there was none.
    decode_tokens_per_second: over the tokens after the first.
    """

    backend: str
    seed: int | None  # None for greedy
    prompt_tokens: int
    generated_tokens: int
    queue_time: float
    time_to_first_token: float | None
    total_time: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    peak_kv_blocks: int
    stopped_by: str  # "eos", "stop string", "max_tokens", "context", "cancelled" …

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
