"""Which sequences run in the next step, and how many of their rows."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from localllm.engine.block_pool import BlockPool
from localllm.engine.sequence import Sequence

# Rows of a step in which some sequence decodes: its next token waits for all of them.
_SHARED_ROWS = 128


@dataclass(frozen=True)
class Scheduled:
    """`rows` pending tokens of a sequence; it yields a token when they are all that is pending."""

    sequence: Sequence
    rows: int

    @property
    def yields_token(self) -> bool:
        return self.rows == self.sequence.pending


class Scheduler:
    """First come, first served. A sequence is admitted when the pool can hold all it may become,

    so that a running one never has to give way. Running sequences decode one row each; what is
    left of the step's row budget goes to prefill, oldest first.
    """

    def __init__(self, pool: BlockPool, *, max_batch: int, step_rows: int) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.step_rows = max(step_rows, max_batch)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._reserved = 0  # blocks promised to running sequences, held or not

    def add(self, sequence: Sequence) -> None:
        assert self.pool.blocks_for(sequence.limit) <= self.pool.num_blocks
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        self._admit()
        chosen: list[Scheduled] = []
        decoding = [s for s in self.running if s.pending == 1]
        budget = self.step_rows
        if decoding:
            budget = min(budget, max(_SHARED_ROWS, self.max_batch))
        prefilling = [s for s in self.running if s.pending > 1]
        for sequence in (*decoding, *prefilling):
            rows = min(sequence.pending, budget)
            if rows == 0:
                break
            budget -= rows
            self._hold_blocks(sequence, sequence.computed + rows)
            chosen.append(Scheduled(sequence, rows))
        return chosen

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._reserved -= self.pool.blocks_for(sequence.limit)
            self.pool.release(sequence.blocks)
            sequence.blocks = []
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            needed = self.pool.blocks_for(self.waiting[0].limit)
            if self._reserved + needed > self.pool.num_blocks:
                return
            sequence = self.waiting.popleft()
            sequence.started = time.perf_counter()
            self._reserved += needed
            self.running.append(sequence)

    def _hold_blocks(self, sequence: Sequence, positions: int) -> None:
        missing = self.pool.blocks_for(positions) - len(sequence.blocks)
        if missing > 0:
            sequence.blocks += self.pool.allocate(missing)
            sequence.peak_blocks = max(sequence.peak_blocks, len(sequence.blocks))
