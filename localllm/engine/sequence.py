"""A request and its life in the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from localllm.engine.kv_cache import BlockTable, PrefixHit
from localllm.engine.receipt import Receipt
from localllm.sampling import Constraint, Draw, Sampler, SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """token_ids: the prompt. eos_ids: the model's own end ids (ignored with `ignore_eos`).

    constraint: what the answer must match, at its beginning; it is copied, not changed.
    adapter: the name of a registered one; None: the base model alone.
    priority: lower goes first; equal ones in order of arrival.
    reuse: whether cached KV may stand in for computing the prompt.
    """

    token_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    adapter: str | None = None
    priority: int = 0
    reuse: bool = True

    @property
    def samples(self) -> int:
        """Answers to be made, each with an id of its own."""
        return self.params.samples

    @property
    def stop_ids(self) -> frozenset[int]:
        own = frozenset() if self.params.ignore_eos else self.eos_ids
        return own | frozenset(self.params.stop_token_ids)


@dataclass
class Speculation:
    """What drafts a sequence has now, and how they did so far."""

    drafts: list[int] = field(default_factory=list)  # proposed to follow its tokens in this step
    drafter: str | None = None  # of the drafts in this step
    used: str | None = None  # of any step
    drafted: int = 0
    accepted: int = 0


@dataclass(eq=False)
class Sequence:
    """Prompt and answer so far, and how much of it stands in the KV cache."""

    id: int
    request: Request
    sampler: Sampler
    limit: int  # positions it may grow to: its own max_tokens or the context
    table: BlockTable
    tokens: list[int]
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    waiting_since: int = 0  # the scheduler's step in which it began to wait
    computed: int = 0
    hit: PrefixHit | None = None  # of its first start
    adapter: int | None = None  # the backend's index, while it is running
    speculation: Speculation = field(default_factory=Speculation)
    prompt_logprobs: list[Draw] = field(default_factory=list)  # of the prompt's tokens 1 …
    peak_blocks: int = 0
    preemptions: int = 0
    resting: bool = False  # a beam that waits for the others of its search: nothing to compute
    ended: tuple[FinishReason, str] | None = None  # why its last token was the last
    ended_by_id: bool = False  # the last token is a stop id, drawn but not part of the answer

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Who goes first; the id is the order of arrival."""
        return self.resting, self.request.priority, self.id

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

    @property
    def decoding(self) -> bool:
        return self.pending == 1 and self.generated > 0

    @property
    def wants_prompt_logprobs(self) -> bool:
        asked = self.request.params.prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) + 1 < self.prompt_length

    def next_ids(self, rows: int) -> np.ndarray:
        """int32: the pending tokens and the drafts after them, so many of them."""
        ids = (*self.tokens[self.computed :], *self.speculation.drafts)[:rows]
        return np.array(ids, dtype=np.int32)

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
        started, first, hit = self.started, self.first_token, self.hit
        cached = 0 if hit is None else hit.tokens
        prefill = first - started if first is not None and started is not None else None
        decode = now - first if first is not None and self.generated > 1 else None
        return Receipt(
            backend=backend,
            seed=self.sampler.seed if self.request.params.draws else None,
            adapter=self.request.adapter,
            prompt_tokens=self.prompt_length,
            cached_tokens=cached,
            cached_from_disk=0 if hit is None else hit.from_disk,
            cache_stop="it never started" if hit is None else hit.why,
            generated_tokens=self.generated - self.ended_by_id,
            drafted_tokens=self.speculation.drafted,
            accepted_tokens=self.speculation.accepted,
            drafter=self.speculation.used,
            queue_time=(started if started is not None else now) - self.arrived,
            time_to_first_token=None if first is None else first - self.arrived,
            total_time=now - self.arrived,
            prefill_tokens_per_second=(
                (self.prompt_length - cached) / prefill if prefill else None
            ),
            decode_tokens_per_second=(self.generated - 1) / decode if decode else None,
            peak_kv_blocks=self.peak_blocks,
            preemptions=self.preemptions,
            stopped_by=stopped_by,
        )
