"""A request and its life in the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from localllm.engine.receipt import Receipt
from localllm.sampling import Constraint, Draw, Sampler, SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """token_ids: the prompt. eos_ids: the model's own end ids (ignored with `ignore_eos`).

    constraint: what the answer must match, at its beginning; it is copied, not changed.
    """

    token_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None

    @property
    def stop_ids(self) -> frozenset[int]:
        own = frozenset() if self.params.ignore_eos else self.eos_ids
        return own | frozenset(self.params.stop_token_ids)


@dataclass
class Sequence:
    """Prompt and answer so far, and how much of it stands in the KV cache."""

    id: int
    request: Request
    sampler: Sampler
    limit: int  # positions it may grow to: its own max_tokens or the context
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    peak_blocks: int = 0
    ended_by_id: bool = False  # the last token is a stop id, drawn but not part of the answer

    def __post_init__(self) -> None:
        self.tokens = list(self.request.token_ids)

    @property
    def prompt_length(self) -> int:
        return len(self.request.token_ids)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens not yet run through the model."""
        return len(self.tokens) - self.computed

    def pending_ids(self, count: int) -> np.ndarray:
        return np.array(self.tokens[self.computed : self.computed + count], dtype=np.int32)

    def append(self, draw: Draw) -> tuple[FinishReason, str] | None:
        """Takes a drawn token; returns why the sequence ended, if it did."""
        if self.first_token is None:
            self.first_token = time.perf_counter()
        self.tokens.append(draw.token_id)
        if draw.token_id in self.request.stop_ids:
            self.ended_by_id = True
            return "stop", "eos" if draw.token_id in self.request.eos_ids else "stop token"
        if self.sampler.finished:
            return "stop", "constraint"
        if len(self.tokens) >= self.limit:
            asked = self.request.params.max_tokens
            return "length", "max_tokens" if self.generated == asked else "context"
        return None

    def receipt(self, backend: str, stopped_by: str) -> Receipt:
        now = time.perf_counter()
        started, first = self.started, self.first_token
        prefill = first - started if first is not None and started is not None else None
        decode = now - first if first is not None and self.generated > 1 else None
        return Receipt(
            backend=backend,
            seed=None if self.request.params.greedy else self.sampler.seed,
            prompt_tokens=self.prompt_length,
            generated_tokens=self.generated - self.ended_by_id,
            queue_time=(started if started is not None else now) - self.arrived,
            time_to_first_token=None if first is None else first - self.arrived,
            total_time=now - self.arrived,
            prefill_tokens_per_second=self.prompt_length / prefill if prefill else None,
            decode_tokens_per_second=(self.generated - 1) / decode if decode else None,
            peak_kv_blocks=self.peak_blocks,
            stopped_by=stopped_by,
        )
