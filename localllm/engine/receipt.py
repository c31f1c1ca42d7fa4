"""What a request cost, given with every result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Receipt:
    """Times are seconds; rates are tokens per second, None where nothing was timed.

    seed: None for greedy.
    cached_tokens: of the prompt, found in the KV cache; cached_from_disk: of those, read from
        disk. cache_stop: why the reuse ended there.
    generated_tokens: those of the answer; a drawn end-of-sequence token is not one of them.
    drafted_tokens, accepted_tokens: proposed by speculation, and those that were the model's own
        draw. drafter: by what they were proposed, None if by nothing.
    queue_time: from arrival to the first step it was part of.
    time_to_first_token: from arrival to the first token, None if there was none.
    prefill_tokens_per_second: over the prompt tokens that were computed.
    decode_tokens_per_second: over the tokens after the first.
    peak_kv_blocks: most blocks it held at once. preemptions: how often it gave way to others.
    stopped_by: "eos", "stop string", "max_tokens", "context", "constraint", "cancelled" …
    """

    backend: str
    seed: int | None
    adapter: str | None
    prompt_tokens: int
    cached_tokens: int
    cached_from_disk: int
    cache_stop: str
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    drafter: str | None
    queue_time: float
    time_to_first_token: float | None
    total_time: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    peak_kv_blocks: int
    preemptions: int
    stopped_by: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
