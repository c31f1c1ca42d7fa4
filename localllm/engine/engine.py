"""The verb loop: add -> schedule -> forward -> sample -> emit."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import count

import numpy as np

from localllm.backend.protocol import Backend, Batch, Chunk, StepCancelled
from localllm.engine.block_pool import BlockPool
from localllm.engine.receipt import Receipt
from localllm.engine.scheduler import Scheduled, Scheduler
from localllm.engine.sequence import FinishReason, Request, Sequence
from localllm.errors import InvalidRequest, OutOfMemoryPlan, PromptTooLong
from localllm.machine import memory
from localllm.sampling import Draw, Sampler, check_token_ids

# Logits a step of `Engine.logits` yields at most: 32 MiB beside the result they are copied to.
_STEP_LOGITS = 1 << 23


@dataclass(frozen=True)
class Token:
    """A drawn token. Stop ids are drawn too, but not emitted."""

    request_id: int
    draw: Draw


@dataclass(frozen=True)
class Finished:
    """The last event of a request. `error` is set when it failed; then `reason` is "cancelled"."""

    request_id: int
    reason: FinishReason
    receipt: Receipt
    error: Exception | None = None


Event = Token | Finished


class Engine:
    """Runs requests together over one backend and its KV pool. Not thread-safe; `LLM` is.

    context: positions a sequence may fill. step_rows: rows computed in one step at most, None for
    what suits the backend.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        context: int,
        max_batch: int = 32,
        step_rows: int | None = None,
    ) -> None:
        step_rows = backend.step_rows if step_rows is None else step_rows
        assert context <= backend.num_blocks * backend.block_size
        self.backend = backend
        self.context = context
        self.step_rows = step_rows
        self.pool = BlockPool(backend.num_blocks, backend.block_size)
        self.scheduler = Scheduler(self.pool, max_batch=max_batch, step_rows=step_rows)
        self._ids = count()
        self._sequences: dict[int, Sequence] = {}

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    def add(self, request: Request) -> int:
        """Queues a request and returns its id. Raises what `check` raises."""
        self.check(request)
        length = len(request.token_ids)
        asked = request.params.max_tokens
        limit = self.context if asked is None else min(self.context, length + asked)
        constraint = request.constraint
        sampler = Sampler(
            request.params,
            request.token_ids,
            self.backend.spec.vocab_size,
            request.stop_ids,
            None if constraint is None else constraint.fork(),
        )
        sequence = Sequence(next(self._ids), request, sampler, limit)
        self._sequences[sequence.id] = sequence
        self.scheduler.add(sequence)
        return sequence.id

    def check(self, request: Request) -> None:
        """Raises `InvalidRequest` or `PromptTooLong` for a request that cannot be run."""
        self._check_prompt(request.token_ids, room=1)
        check_token_ids(request.params, self.backend.spec.vocab_size)

    def end(
        self, request_id: int, reason: FinishReason = "cancelled", by: str = "cancelled"
    ) -> Finished | None:
        """Ends a request now, between steps, and frees its blocks; None if it had ended."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._finish(sequence, reason, by)

    def cancel_step(self) -> None:
        """From any thread: a step under way ends soon, and its rows are left for the next one."""
        self.backend.cancel()

    def step(self) -> list[Event]:
        """Advances every scheduled sequence by one forward pass; none if it is cancelled."""
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return []
        try:
            logits = self.backend.forward(Batch(tuple(map(_chunk, scheduled))))
        except StepCancelled:
            return []
        except Exception as error:
            # The pool's contents are in doubt for exactly the sequences of this step.
            return [self._fail(item.sequence, error) for item in scheduled]
        events: list[Event] = []
        row = 0
        for item in scheduled:
            sequence = item.sequence
            yields_token = item.yields_token
            sequence.computed += item.rows
            if yields_token:
                events += self._advance(sequence, logits[row])
                row += 1
        return events

    def logits(self, token_ids: Seq[int]) -> np.ndarray:
        """float32 [T, V]: the logits after every token of one sequence, outside any batch.

        Raises InvalidRequest, PromptTooLong, and OutOfMemoryPlan for more than memory can hold.
        """
        self._check_prompt(token_ids, room=0)
        vocab = self.backend.spec.vocab_size
        size, free = len(token_ids) * vocab * 4, memory().available
        if size > free:
            raise OutOfMemoryPlan(
                f"logits of {len(token_ids)} tokens over a vocabulary of {vocab} take "
                f"{size >> 20} MiB, and {free >> 20} are free",
                hint="ask for those of fewer tokens",
            )
        ids = np.array(token_ids, dtype=np.int32)
        needed = self.pool.blocks_for(len(ids))
        if needed > self.pool.free:
            raise PromptTooLong(
                f"{len(ids)} tokens need {needed} KV blocks and {self.pool.free} are free",
                hint="wait for running requests to end, or load the model with a larger context",
            )
        blocks = self.pool.allocate(needed)
        table = np.array(blocks, dtype=np.int32)
        try:
            logits = np.empty((len(ids), self.backend.spec.vocab_size), dtype=np.float32)
            rows = min(self.step_rows, max(1, _STEP_LOGITS // logits.shape[1]))
            for start in range(0, len(ids), rows):
                part = ids[start : start + rows]
                chunk = Chunk(part, start, table, tuple(range(len(part))), len(ids))
                logits[start : start + len(part)] = self._forward(Batch((chunk,)))
            return logits
        finally:
            self.pool.release(blocks)

    def _forward(self, batch: Batch) -> np.ndarray:
        """Runs a batch that no request may cancel."""
        while True:
            try:
                return self.backend.forward(batch)
            except StepCancelled:
                continue

    def _advance(self, sequence: Sequence, logits: np.ndarray) -> list[Event]:
        try:
            draw = sequence.sampler.draw(logits, position=len(sequence.tokens))
        except Exception as error:
            return [self._fail(sequence, error)]
        end = sequence.append(draw)
        is_stop_id = sequence.ended_by_id
        events: list[Event] = [] if is_stop_id else [Token(sequence.id, draw)]
        if end is not None:
            events.append(self._finish(sequence, *end))
        return events

    def _check_prompt(self, token_ids: Seq[int], *, room: int) -> None:
        vocab = self.backend.spec.vocab_size
        if not token_ids:
            raise InvalidRequest("the prompt is empty", hint="give at least one token")
        for index, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab:
                raise InvalidRequest(
                    f"token {token_id} at index {index} is outside the vocabulary of {vocab}"
                )
        if len(token_ids) + room > self.context:
            raise PromptTooLong(
                f"the prompt has {len(token_ids)} tokens and the context holds {self.context}",
                hint="shorten it, or ask for a larger context (--context; this model supports "
                f"{self.backend.spec.context})",
            )

    def _finish(
        self, sequence: Sequence, reason: FinishReason, by: str, error: Exception | None = None
    ) -> Finished:
        self.scheduler.remove(sequence)
        del self._sequences[sequence.id]
        return Finished(sequence.id, reason, sequence.receipt(self.backend.name, by), error)

    def _fail(self, sequence: Sequence, error: Exception) -> Finished:
        return self._finish(sequence, "cancelled", f"error: {error}", error)


def _chunk(item: Scheduled) -> Chunk:
    sequence = item.sequence
    return Chunk(
        token_ids=sequence.pending_ids(item.rows),
        start=sequence.computed,
        block_table=np.array(sequence.blocks, dtype=np.int32),
        logit_rows=(item.rows - 1,) if item.yields_token else (),
        prompt_length=sequence.prompt_length,
    )
