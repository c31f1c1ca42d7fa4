"""Which sequences run in the next step, and how many of their rows."""

from __future__ import annotations

import time
from dataclasses import dataclass

from localllm.engine.adapters import AdapterSlots
from localllm.engine.kv_cache import KvCache, PrefixHit
from localllm.engine.sequence import Sequence
from localllm.errors import LocalLLMError

# Rows of a step in which some sequence decodes: its next token waits for all of them.
_SHARED_ROWS = 128
# Steps of waiting that weigh as much as one step of priority, so that no request starves.
_PATIENCE = 512


@dataclass(frozen=True)
class Scheduled:
    """`rows` tokens of a sequence, pending ones and then drafts.

    It yields a token when nothing pending is left out.
    """

    sequence: Sequence
    rows: int

    @property
    def yields_token(self) -> bool:
        return self.rows >= self.sequence.pending


class Scheduler:
    """By priority, then first come, first served.

    A sequence is admitted when the pools can hold what it has so far, with a little to spare, not
    what it may become: when blocks run out the one that came last gives way, and goes on later
    from what the prefix cache still has. Running sequences decode first; what is left of the
    step's row budget goes to prefill. While some sequence decodes a step has at most
    `_SHARED_ROWS` rows (or one for each running sequence), which bounds what a long prompt adds
    to the time between the others' tokens.

    logit_rows: rows with logits in a step at most. adapters: what adapters of requests come from; a
    running sequence has its own loaded.
    """

    def __init__(
        self,
        cache: KvCache,
        adapters: AdapterSlots,
        *,
        max_batch: int,
        step_rows: int,
        logit_rows: int,
    ) -> None:
        self.cache = cache
        self.adapters = adapters
        self.max_batch = max_batch
        self.step_rows = max(step_rows, max_batch)
        self.logit_rows = max(logit_rows, max_batch)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.admitted: list[Sequence] = []  # by the last `schedule`
        self.preempted: list[Sequence] = []  # by the last `schedule`
        self.failed: list[tuple[Sequence, Exception]] = []  # by the last `schedule`, and why
        self._steps = 0

    def add(self, sequence: Sequence) -> None:
        sequence.waiting_since = self._steps
        self.waiting.append(sequence)

    def add_running(self, sequence: Sequence) -> None:
        """A fork, with its blocks; it waits without them if the batch is full."""
        sequence.adapter = None
        if len(self.running) < self.max_batch:
            self._acquire(sequence)
            self.running.append(sequence)
            return
        self.cache.close(sequence.table)
        sequence.computed = 0
        self.add(sequence)

    def schedule(self) -> list[Scheduled]:
        self._steps += 1
        self.admitted, self.preempted, self.failed = [], [], []
        self._admit()
        self.running.sort(key=_rank)
        wanted = self._share_rows()
        held: dict[int, int] = {}
        for sequence in list(self.running):  # whoever ranks first gets blocks first
            if sequence.id in wanted and sequence in self.running:
                held[sequence.id] = self._hold(sequence, wanted[sequence.id], held)
        chosen = [s for s in self.running if held.get(s.id)]
        return [Scheduled(sequence, held[sequence.id]) for sequence in chosen]

    def _share_rows(self) -> dict[int, int]:
        """Rows for each running sequence: first a row for everyone who decodes, then the rest."""
        decoding = [s for s in self.running if s.decoding and not s.resting]
        prefilling = [s for s in self.running if s.pending and not s.decoding and not s.resting]
        budget = self.step_rows
        if decoding:
            budget = min(budget, max(_SHARED_ROWS, self.max_batch))
        wanted = {}
        logits = self.logit_rows  # for prompts of which every row wants them
        for sequence in (*decoding, *prefilling):
            drafts = sequence.speculation.drafts
            rows = min(sequence.pending, budget)
            if sequence.wants_prompt_logprobs:
                rows = min(rows, logits)
                logits -= rows
            del drafts[max(0, budget - rows) :]
            if rows:
                wanted[sequence.id] = rows
                budget -= rows + len(drafts)
        return wanted

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives up its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.cache.close(sequence.table)

    # ---- admission

    def _admit(self) -> None:
        while best := min((s for s in self.waiting if not s.resting), key=self._turn, default=None):
            if not self._has_place(best):
                worst = max(self.running, key=_rank, default=None)
                if worst is None or not _gives_way(worst, best):
                    return
                self._preempt(worst)
                continue
            self.waiting.remove(best)
            try:
                self._acquire(best)
            except LocalLLMError as error:
                self.failed.append((best, error))
            else:
                self._start(best)

    def _turn(self, sequence: Sequence) -> tuple[int, int]:
        waited = (self._steps - sequence.waiting_since) // _PATIENCE
        return sequence.request.priority - waited, sequence.id

    def _has_place(self, sequence: Sequence) -> bool:
        name = sequence.request.adapter
        return (
            len(self.running) < self.max_batch
            and (name is None or not self.adapters.busy_for(name))
            and self.cache.room_to_start(
                sequence.table, sequence.tokens, rows=self.step_rows, spare=len(self.running)
            )
        )

    def _acquire(self, sequence: Sequence) -> None:
        name = sequence.request.adapter
        sequence.adapter = None if name is None else self.adapters.acquire(name)

    def _release(self, sequence: Sequence) -> None:
        if sequence.adapter is not None:
            assert sequence.request.adapter is not None
            self.adapters.release(sequence.request.adapter)
            sequence.adapter = None

    def _start(self, sequence: Sequence) -> None:
        if sequence.started is None:
            sequence.started = time.perf_counter()
        if sequence.wants_prompt_logprobs:
            hit = PrefixHit(0, 0, "prompt_logprobs needs every position computed")
        elif not sequence.request.reuse:
            hit = PrefixHit(0, 0, "the request asked for none")
        else:
            hit = self.cache.reuse(sequence.table, sequence.tokens, len(sequence.tokens) - 1)
        self.cache.begin(sequence.table, len(sequence.tokens), hit)
        sequence.computed = hit.tokens
        if sequence.hit is None:
            sequence.hit = hit
        self.running.append(sequence)
        self.admitted.append(sequence)

    # ---- blocks

    def _hold(self, sequence: Sequence, rows: int, held: dict[int, int]) -> int:
        """Blocks for so many rows and the drafts after them; the rows that can run now.

        Those that come after in rank may have to give way, and if there is none, the sequence
        itself.
        """
        drafts = sequence.speculation.drafts
        if drafts and not self._held(sequence, rows, len(drafts)):
            drafts.clear()
        while not self._held(sequence, rows, len(drafts)):
            worst = max((s for s in self.running if s.id not in held), key=_rank)
            if worst is sequence and len(self.running) == 1:
                return 0  # blocks on their way to disk come back soon
            self._preempt(worst)
            if worst is sequence:
                return 0
        return rows + len(drafts)

    def _held(self, sequence: Sequence, rows: int, drafts: int) -> bool:
        start, others = sequence.computed, len(self.running) - 1
        stop = start + rows + drafts
        if not self.cache.hold(sequence.table, start, stop, guesses=drafts, spare=others):
            return False
        sequence.peak_blocks = max(sequence.peak_blocks, sequence.table.blocks)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.cache.close(sequence.table)
        sequence.computed = 0
        sequence.speculation.drafts.clear()
        sequence.preemptions += 1
        self.preempted.append(sequence)
        self.add(sequence)


def _rank(sequence: Sequence) -> tuple[bool, int, int]:
    return sequence.rank


def _gives_way(running: Sequence, waiting: Sequence) -> bool:
    return running.resting or running.request.priority > waiting.request.priority
