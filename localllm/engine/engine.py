"""The verb loop: add -> draft -> schedule -> forward -> sample -> emit."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from localllm.backend.protocol import Backend, Batch, Chunk, StepCancelled
from localllm.engine.adapters import AdapterSlots
from localllm.engine.beam import Beam, BeamSearch
from localllm.engine.drafters import PromptLookup
from localllm.engine.events import (
    BatchRow,
    Ended,
    EventBus,
    Forked,
    Preempted,
    Queued,
    RowKind,
    Started,
    StepDone,
)
from localllm.engine.kv_cache import BlockTable, Disk, KvCache
from localllm.engine.planner import DRAFT_ROWS, STEP_LOGITS
from localllm.engine.receipt import Receipt
from localllm.engine.scheduler import Scheduled, Scheduler
from localllm.engine.sequence import FinishReason, Request, Sequence
from localllm.engine.speculative import Drafter, Speculator
from localllm.errors import InvalidRequest, LocalLLMError, OutOfMemoryPlan, PromptTooLong
from localllm.machine import memory
from localllm.sampling import (
    Draw,
    Sampler,
    SamplingParams,
    check_token_ids,
    draw_batch,
    logprobs_of,
)
from localllm.spec.rope import length_class

StateWatcher = Callable[[Sequence, int, np.ndarray], None]


@dataclass(frozen=True)
class Token:
    """A drawn token. Stop ids are drawn too, but not emitted.

    guess: what speculation had guessed for its place, None where it had not.
    """

    request_id: int
    draw: Draw
    guess: int | None = None


@dataclass(frozen=True)
class Finished:
    """The last event of a request. `error` is set when it failed; then `reason` is "cancelled".

    prompt_logprobs: of the prompt's tokens 1 …, if they were asked for.
    """

    request_id: int
    reason: FinishReason
    receipt: Receipt
    error: Exception | None = None
    prompt_logprobs: tuple[Draw, ...] | None = None


Event = Token | Finished


@dataclass
class _Row:
    """A row of logits and the sequence whose next token it decides. chunk: the step's with it."""

    sequence: Sequence
    row: int
    chunk: int
    accepted: int = 0


class Engine:
    """Runs requests together over one backend and its KV pool. Not thread-safe; `LLM` is.

    context: positions a sequence may fill. step_rows: rows computed in one step at most, None for
    what suits the backend. drafters: whose guesses may be used, prompt lookup beside them.
    draft_rows: rows of guesses in one step at most. disk: where KV blocks are kept when the pool
    has no place for them. key: stands for the weights, in the names of blocks on disk. adapters:
    those that requests may name; None: none.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        context: int,
        max_batch: int = 32,
        step_rows: int | None = None,
        drafters: Seq[Drafter] = (),
        draft_rows: int = DRAFT_ROWS,
        disk: Disk | None = None,
        key: bytes = b"",
        adapters: AdapterSlots | None = None,
    ) -> None:
        step_rows = backend.step_rows if step_rows is None else step_rows
        self.backend = backend
        self.context = context
        self.step_rows = step_rows
        self.cache = KvCache(backend, disk)
        self.adapters = adapters or AdapterSlots(backend, max_adapters=0, max_bytes=0)
        assert self.cache.fits(context, max(step_rows, max_batch)), "the pool holds no full context"
        self.scheduler = Scheduler(
            self.cache,
            self.adapters,
            max_batch=max_batch,
            step_rows=step_rows,
            logit_rows=max(1, STEP_LOGITS // backend.spec.vocab_size),
        )
        self.speculator = Speculator([PromptLookup(), *drafters])
        self.events = EventBus()
        self._draft_rows = draft_rows
        self._watcher: StateWatcher | None = None
        self._key = key
        self._ropes = tuple(dict.fromkeys(attn.rope for _, attn in backend.spec.attentions))
        self._ids = count()
        self._sequences: dict[int, Sequence] = {}
        self._unforked: dict[int, int] = {}  # samples that await their prompt -> whose it is
        self._searches: dict[int, BeamSearch] = {}  # by the id of every request that awaits one
        self._beams: dict[int, BeamSearch] = {}  # by the id of every live beam

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    # ---- requests come and go

    def add(self, request: Request) -> int:
        """Queues a request and returns its id. Raises what `check` raises.

        A request for several samples takes as many ids, one after the other; each has its own
        events, as if it were a request of its own with the seed one higher.
        """
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
        sequence = Sequence(
            next(self._ids),
            request,
            sampler,
            limit,
            self.cache.open(self._root(request)),
            list(request.token_ids),
        )
        others = [next(self._ids) for _ in range(1, request.samples)]
        if request.params.beams is None:
            self._unforked.update(dict.fromkeys(others, sequence.id))
        else:
            search = BeamSearch(sequence, request.params.beams)
            search.request_ids = [sequence.id, *others]
            self._searches.update(dict.fromkeys(search.request_ids, search))
            self._beams[sequence.id] = search
        self._sequences[sequence.id] = sequence
        self.scheduler.add(sequence)
        if self.events.watched:
            self.events.emit(Queued(sequence.id, length, request.priority))
        return sequence.id

    def watch_states(self, watcher: StateWatcher | None) -> None:
        """Tells it of each sequence what a step computed: the hidden states float32 [n, hidden] at
        the positions from the one it is told on, the last step's too. A sequence that gave way and
        came back begins anew. None: nobody any more."""
        self._watcher = watcher

    def check(self, request: Request) -> None:
        """Raises `InvalidRequest` or `PromptTooLong` for a request that cannot be run."""
        self._check_prompt(request.token_ids, room=1)
        check_token_ids(request.params, self.backend.spec.vocab_size)
        if request.adapter is not None:
            self.adapters.digest(request.adapter)  # it must be known
        drafter, known = request.params.speculation, self.speculator.drafters
        if drafter not in ("auto", "off", *known):
            raise InvalidRequest(
                f"speculation={drafter!r}: this model was loaded without it",
                hint=f"possible here: auto, off, {', '.join(known)}",
            )

    def fork(self, request_id: int, *, seed: int | None = None) -> int:
        """Another request that goes on from where this one stands, at no cost; its id.

        seed: of what it draws from here on; None: the same, so that it goes the same way.
        """
        parent = self._sequences.get(request_id)
        if parent is None or request_id in self._beams:
            raise InvalidRequest(f"request {request_id} is not running, or is a beam search")
        return self._fork(parent, next(self._ids), seed).id

    def end(
        self, request_id: int, reason: FinishReason = "cancelled", by: str = "cancelled"
    ) -> Finished | None:
        """Ends a request now, between steps, and frees its blocks; None if it had ended."""
        parent = self._unforked.pop(request_id, None)
        if parent is not None:
            receipt = self._sequences[parent].receipt(self.backend.name, by)
            return Finished(request_id, reason, receipt)
        search = self._searches.get(request_id)
        if search is not None:
            return self._leave_search(search, request_id, reason, by)
        sequence = self._sequences.get(request_id)
        if sequence is None or request_id in self._beams:
            return None
        if heirs := self._heirs(request_id):
            # Its other samples still need the prompt: the next one takes its place.
            return self._hand_over(sequence, heirs[0], reason, by)
        return self._finish(sequence, reason, by)

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter. Raises InvalidRequest while requests name it, running or waiting:
        what they go on from was computed with it."""
        users = sum(s.request.adapter == name for s in self._sequences.values())
        if users:
            raise InvalidRequest(
                f"adapter {name!r} is used by {users} request(s)",
                hint="wait for them, or cancel them",
            )
        self.adapters.unregister(name)

    def close(self) -> None:
        """Ends every request, and keeps on disk, if there is one, what the prefix cache holds."""
        for request_id in [*self._sequences, *self._unforked, *self._searches]:
            self.end(request_id)
        self.cache.collect()
        self.cache.spill_idle()

    def cancel_step(self) -> None:
        """From any thread: a step under way ends soon, and its rows are left for the next one."""
        self.backend.cancel()

    # ---- a step

    def step(self) -> list[Event]:
        """Advances every scheduled sequence by one forward pass; none if it is cancelled."""
        began = time.perf_counter()
        self.cache.collect()
        self._draft()
        scheduled = self.scheduler.schedule()
        self._tell_schedule()
        events = [
            e for sequence, error in self.scheduler.failed for e in self._fail(sequence, error)
        ]
        if not scheduled:
            if self.busy and not events:
                time.sleep(0.001)  # blocks on their way to disk are all that can be waited for
            return events
        kinds = [_kind(item) for item in scheduled]
        forward_began = time.perf_counter()
        try:
            logits, hidden = self._forward(scheduled)
        except StepCancelled:
            return events
        except Exception as error:
            return events + self._isolate(scheduled, error)
        model_seconds = time.perf_counter() - forward_began
        accepted: dict[int, int] = {}
        events += self._take(scheduled, logits, hidden, accepted)
        if all(kind != "prefill" for kind in kinds):
            self.speculator.pace.record(sum(item.rows for item in scheduled), model_seconds)
        if self.events.watched:
            total = time.perf_counter() - began
            self.events.emit(self._step_done(scheduled, kinds, accepted, model_seconds, total))
        return events

    def cached_tokens(self, token_ids: Seq[int], adapter: str | None = None) -> int:
        """How many of a prompt's first tokens need not be computed now."""
        request = Request(tuple(token_ids), SamplingParams(), frozenset(), adapter=adapter)
        return min(self.cache.known(self._root(request), token_ids), max(0, len(token_ids) - 1))

    def logits(self, token_ids: Seq[int], adapter: str | None = None) -> np.ndarray:
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
        index = None if adapter is None else self.adapters.acquire(adapter)
        table = self.cache.open(b"")
        try:
            logits = np.empty((len(ids), vocab), dtype=np.float32)
            rows = min(self.step_rows, max(1, STEP_LOGITS // vocab))
            for start in range(0, len(ids), rows):
                part = ids[start : start + rows]
                if not self.cache.hold(table, start, start + len(part)):
                    raise self._no_blocks(len(ids))
                wanted = tuple(range(len(part)))
                batch = self._alone(table, part, start, wanted, len(ids), index)
                logits[start : start + len(part)] = self._uncancelled(batch)
                self.cache.settle(table)
                self.cache.leave_windows(table, start + len(part))
            return logits
        finally:
            self.cache.close(table, spill=False)
            if adapter is not None:
                self.adapters.release(adapter)

    def states(self, token_ids: Seq[int], first: int = 0) -> np.ndarray:
        """float32 [T - first, hidden]: what enters the head at each of a sequence's tokens from
        `first` on, outside any batch; raises as `logits` does."""
        self._check_prompt(token_ids, room=0)
        ids = np.array(token_ids, dtype=np.int32)
        found = np.empty((len(ids) - first, self.backend.spec.hidden), np.float32)
        table = self.cache.open(b"")
        try:
            for start in range(0, len(ids), self.step_rows):
                part = ids[start : start + self.step_rows]
                if not self.cache.hold(table, start, start + len(part)):
                    raise self._no_blocks(len(ids))
                hidden = np.empty((len(part), found.shape[1]), np.float32)
                self._uncancelled(self._alone(table, part, start, (), len(ids)), hidden)
                self.cache.settle(table)
                wanted = hidden[max(0, first - start) :]
                at = max(0, start - first)
                found[at : at + len(wanted)] = wanted
                self.cache.leave_windows(table, start + len(part))
            return found
        finally:
            self.cache.close(table, spill=False)

    def _alone(
        self,
        table: BlockTable,
        ids: np.ndarray,
        start: int,
        wanted: tuple[int, ...],
        length: int,
        adapter: int | None = None,
    ) -> Batch:
        """One chunk of a sequence of so many tokens that is none of the requests'."""
        ((_, state),) = self.cache.slots(table, start + len(ids), 0)
        blocks = self.cache.block_table(table)
        return Batch((Chunk(ids, start, blocks, wanted, length, adapter, state),))

    def _no_blocks(self, tokens: int) -> PromptTooLong:
        return PromptTooLong(
            f"{tokens} tokens need more KV blocks than the {self.cache.available} that are free",
            hint="wait for running requests to end, or load the model with a larger context",
        )

    # ---- inside a step

    def _draft(self) -> None:
        ready = [s for s in self.scheduler.running if s.decoding and s.id not in self._beams]
        if ready:
            self.speculator.propose(ready, self._draft_rows)

    def _forward(self, scheduled: Seq[Scheduled]) -> tuple[np.ndarray, np.ndarray | None]:
        chunks = tuple(chunk for item in scheduled for chunk in self._chunks(item))
        hidden: np.ndarray | None = None
        if self.speculator.wants_states or self._watcher is not None:
            rows = sum(len(chunk.token_ids) for chunk in chunks)
            hidden = np.empty((rows, self.backend.spec.hidden), np.float32)
        return self.backend.forward(Batch(chunks), hidden), hidden

    def _isolate(self, scheduled: Seq[Scheduled], error: Exception) -> list[Event]:
        """After a step that raised: each sequence alone, so that only the guilty ones fail."""
        if len(scheduled) == 1:
            return self._fail(scheduled[0].sequence, error)
        events: list[Event] = []
        for item in scheduled:
            if item.sequence.id not in self._sequences:
                continue  # a beam of a search that has failed
            try:
                logits, hidden = self._forward([item])
            except StepCancelled:
                continue
            except Exception as own:
                events += self._fail(item.sequence, own)
            else:
                events += self._take([item], logits, hidden, {})
        return events

    def _take(
        self,
        scheduled: Seq[Scheduled],
        logits: np.ndarray,
        hidden: np.ndarray | None,
        accepted: dict[int, int],
    ) -> list[Event]:
        """Draws from a step's logits; `accepted` learns of every sequence's right drafts."""
        events: list[Event] = []
        rows: list[_Row] = []
        before = [item.sequence.computed for item in scheduled]
        at, chunks = 0, 0
        for item in scheduled:
            sequence = item.sequence
            asked = self._logit_rows(item)
            chunks += self.cache.chunks(sequence.table)
            self.cache.settle(sequence.table)
            try:
                if sequence.wants_prompt_logprobs:
                    self._note_prompt(item, logits[at : at + len(asked)])
            except LocalLLMError as error:
                events += self._fail(sequence, error)
                at += len(asked)
                continue
            if item.yields_token:
                drafts = item.rows - sequence.pending
                rows.append(_Row(sequence, at + len(asked) - 1 - drafts, chunks - 1))
                sequence.computed += sequence.pending
            else:
                sequence.computed += item.rows
            at += len(asked)
        rows = [*rows, *self._samples(rows)]
        events += self._draw(rows, logits)
        for row in rows:
            sequence = row.sequence
            if sequence.id not in self._sequences:
                continue  # it has failed
            drafts = len(sequence.speculation.drafts)
            accepted[sequence.id] = row.accepted
            self.cache.accept(sequence.table, row.chunk, sequence.computed, row.accepted)
            sequence.computed += row.accepted
            if drafts:
                self.speculator.learn(sequence, drafts, row.accepted)
                sequence.speculation.drafts.clear()
        at = 0
        for item, start in zip(scheduled, before, strict=True):
            sequence = item.sequence
            if sequence.id in self._sequences:
                self.cache.advance(sequence.table, sequence.tokens, sequence.computed)
                if hidden is not None:
                    states = hidden[at : at + sequence.computed - start].copy()
                    if self._watcher is not None:
                        self._watcher(sequence, start, states)
                    if sequence.ended is None:
                        self.speculator.observe(sequence, start, states)
            at += item.rows
        for row in rows:
            if row.sequence.id in self._sequences and row.sequence.ended is not None:
                events.append(self._finish(row.sequence, *row.sequence.ended))
        return events

    def _draw(self, rows: Seq[_Row], logits: np.ndarray) -> list[Event]:
        """A token for each row, and another one wherever a draft was right."""
        events: list[Event] = []
        searching = [row for row in rows if row.sequence.id in self._beams]
        active = [row for row in rows if row.sequence.id not in self._beams]
        while active:
            draws = draw_batch(
                [row.sequence.sampler for row in active],
                _rows_of(logits, [row.row for row in active]),
                [len(row.sequence.tokens) for row in active],
            )
            going_on = []
            for row, draw in zip(active, draws, strict=True):
                sequence = row.sequence
                if isinstance(draw, Exception):
                    events += self._fail(sequence, draw)
                    continue
                sequence.ended = sequence.append(draw)
                drafts = sequence.speculation.drafts
                guess = drafts[row.accepted] if row.accepted < len(drafts) else None
                if not sequence.ended_by_id:
                    events.append(Token(sequence.id, draw, guess))
                right = guess == draw.token_id
                if right and sequence.ended is None:
                    row.accepted += 1
                    row.row += 1
                    going_on.append(row)
            active = going_on
        for row in searching:
            # It may have been dropped, or gone on, by what another beam's row decided.
            if row.sequence.id in self._beams and not row.sequence.pending:
                events += self._search(self._beams[row.sequence.id], row.sequence, logits[row.row])
        return events

    def _samples(self, rows: Seq[_Row]) -> list[_Row]:
        """Forks for those samples whose prompt is now computed, to draw from the same row."""
        forks = []
        for row in rows:
            if row.sequence.generated or row.sequence.id in self._beams:
                continue
            for child in self._heirs(row.sequence.id):
                del self._unforked[child]
                seed = _seed_of(row.sequence, child)
                forks.append(_Row(self._fork(row.sequence, child, seed), row.row, row.chunk))
        return forks

    def _heirs(self, request_id: int) -> list[int]:
        """The samples that await the prompt of this request."""
        return [child for child, whose in self._unforked.items() if whose == request_id]

    def _fork(self, parent: Sequence, child_id: int, seed: int | None) -> Sequence:
        child = replace(
            parent,
            id=child_id,
            sampler=parent.sampler.fork(seed),
            table=self.cache.fork(parent.table, parent.computed),
            tokens=list(parent.tokens),
            speculation=replace(parent.speculation, drafts=[]),
            prompt_logprobs=list(parent.prompt_logprobs),
        )
        self._sequences[child_id] = child
        if parent in self.scheduler.running:
            self.scheduler.add_running(child)
        else:
            self.scheduler.add(child)
        if self.events.watched:
            self.events.emit(Forked(child_id, parent.id))
        return child

    def _note_prompt(self, item: Scheduled, logits: np.ndarray) -> None:
        """Log-probabilities of the prompt's own tokens, each from the row before it."""
        sequence = item.sequence
        asked = sequence.request.params.prompt_logprobs
        assert asked is not None
        for row in range(len(logits)):
            position = sequence.computed + row + 1
            if len(sequence.prompt_logprobs) + 1 == position < sequence.prompt_length:
                token = sequence.tokens[position]
                sequence.prompt_logprobs.append(logprobs_of(logits[row], token, asked))

    def _chunks(self, item: Scheduled) -> list[Chunk]:
        """One, or several where states are kept in between."""
        sequence = item.sequence
        ids, start = sequence.next_ids(item.rows), sequence.computed
        wanted, table = self._logit_rows(item), self.cache.block_table(sequence.table)
        chunks = []
        guesses = max(0, item.rows - sequence.pending)
        at = 0
        for stop, state in self.cache.slots(sequence.table, start + item.rows, guesses):
            end = stop - start
            chunks.append(
                Chunk(
                    token_ids=ids[at:end],
                    start=start + at,
                    block_table=table,
                    logit_rows=tuple(row - at for row in wanted if at <= row < end),
                    prompt_length=sequence.prompt_length,
                    adapter=sequence.adapter,
                    state=state,
                )
            )
            at = end
        return chunks

    @staticmethod
    def _logit_rows(item: Scheduled) -> tuple[int, ...]:
        sequence = item.sequence
        if sequence.wants_prompt_logprobs:
            return tuple(range(item.rows))
        return tuple(range(sequence.pending - 1, item.rows)) if item.yields_token else ()

    # ---- beams

    def _search(self, search: BeamSearch, sequence: Sequence, logits: np.ndarray) -> list[Event]:
        if sequence.first_token is None:
            sequence.first_token = time.perf_counter()
        try:
            if not search.offer(sequence, logits):
                return []
        except LocalLLMError as error:
            return self._fail(sequence, error)
        before = {beam.sequence.id: beam for beam in search.live}
        extensions = search.extend()
        if not extensions:
            return self._finish_beams(search)
        heirs: list[Sequence] = []
        kept: set[int] = set()
        for extension in extensions:
            heir = extension.parent.sequence
            if heir.id in kept:
                heir = self._fork(heir, next(self._ids), None)
                self._beams[heir.id] = search
            kept.add(heir.id)
            heirs.append(heir)
        search.live = []
        for heir, extension in zip(heirs, extensions, strict=True):
            heir.tokens.append(extension.draw.token_id)
            heir.sampler.accept(extension.draw.token_id)
            draws = (*extension.parent.draws, extension.draw)
            search.live.append(Beam(heir, draws, extension.total))
        for beam in before.values():
            if beam.sequence.id not in kept:
                self._drop_beam(beam.sequence)
        return []

    def _finish_beams(self, search: BeamSearch) -> list[Event]:
        events: list[Event] = []
        results = search.results()
        for request_id in list(search.request_ids):
            place = request_id - search.owner.id  # whoever left before took theirs along
            if place >= len(results):
                events.append(self._leave_search(search, request_id, "stop", "no more answers"))
                continue
            found = results[place]
            reason: FinishReason = "length" if found.by in ("max_tokens", "context") else "stop"
            events += [Token(request_id, draw) for draw in found.draws]
            events.append(
                self._leave_search(search, request_id, reason, found.by, len(found.draws))
            )
        return events

    def _leave_search(
        self,
        search: BeamSearch,
        request_id: int,
        reason: FinishReason,
        by: str,
        tokens: int = 0,
        error: Exception | None = None,
    ) -> Finished:
        """Ends one of the requests that await a search, and with the last of them the search.

        tokens: of its answer.
        """
        del self._searches[request_id]
        search.request_ids.remove(request_id)
        if not search.request_ids:
            for beam in search.live:
                self._drop_beam(beam.sequence)
        receipt = search.owner.receipt(self.backend.name, by)
        receipt = replace(receipt, generated_tokens=tokens)
        noted = _noted_prompt(search.owner)
        return self._ended(Finished(request_id, reason, receipt, error, noted))

    def _drop_beam(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.speculator.forget(sequence)
        self._sequences.pop(sequence.id, None)
        self._beams.pop(sequence.id, None)

    # ---- the end of a request

    def _finish(
        self, sequence: Sequence, reason: FinishReason, by: str, error: Exception | None = None
    ) -> Finished:
        self.scheduler.remove(sequence)
        self.speculator.forget(sequence)
        del self._sequences[sequence.id]
        receipt = sequence.receipt(self.backend.name, by)
        noted = _noted_prompt(sequence)
        return self._ended(Finished(sequence.id, reason, receipt, error, noted))

    def _ended(self, finished: Finished) -> Finished:
        if self.events.watched:
            self.events.emit(Ended(finished.request_id, finished.reason, finished.receipt))
        return finished

    def _hand_over(self, sequence: Sequence, heir: int, reason: FinishReason, by: str) -> Finished:
        """Ends a request before its prompt was computed, for the sake of its other samples."""
        receipt = sequence.receipt(self.backend.name, by)
        old = sequence.id
        del self._unforked[heir]
        del self._sequences[old]
        sequence.sampler = sequence.sampler.fork(_seed_of(sequence, heir))
        sequence.id = heir
        self._sequences[heir] = sequence
        self._unforked.update(dict.fromkeys(self._heirs(old), heir))
        return self._ended(Finished(old, reason, receipt))

    def _fail(self, sequence: Sequence, error: Exception) -> list[Event]:
        by = f"error: {error}"
        search = self._beams.get(sequence.id)
        if search is not None:
            ids = list(search.request_ids)
            return [self._leave_search(search, i, "cancelled", by, error=error) for i in ids]
        first = self._finish(sequence, "cancelled", by, error)
        events: list[Event] = [first]
        for child in self._heirs(sequence.id):
            del self._unforked[child]
            events.append(replace(first, request_id=child))
        return events

    # ---- small things

    def _root(self, request: Request) -> bytes:
        """What K and V depend on besides the tokens."""
        length = len(request.token_ids)
        classes = [length_class(rope, length) for rope in self._ropes if rope is not None]
        adapter = b"" if request.adapter is None else self.adapters.digest(request.adapter)
        return self._key + adapter + b"".join(number.to_bytes(8, "little") for number in classes)

    def _uncancelled(self, batch: Batch, hidden: np.ndarray | None = None) -> np.ndarray:
        """Runs a batch that no request may cancel."""
        while True:
            try:
                return self.backend.forward(batch, hidden)
            except StepCancelled:
                continue

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

    def _tell_schedule(self) -> None:
        if not self.events.watched:
            return
        for sequence in self.scheduler.preempted:
            self.events.emit(Preempted(sequence.id))
        for sequence in self.scheduler.admitted:
            self.events.emit(Started(sequence.id, sequence.computed))

    def _step_done(
        self,
        scheduled: Seq[Scheduled],
        kinds: Seq[RowKind],
        accepted: dict[int, int],
        model_seconds: float,
        total_seconds: float,
    ) -> StepDone:
        rows = tuple(
            BatchRow(item.sequence.id, kind, item.rows, accepted.get(item.sequence.id, 0))
            for item, kind in zip(scheduled, kinds, strict=True)
        )
        pools = self.cache.pools
        return StepDone(
            rows,
            model_seconds,
            total_seconds,
            len(self.scheduler.waiting),
            len(self.scheduler.running),
            self.cache.in_use,
            self.cache.idle,
            sum(pool.num_blocks for pool in pools),
            sum(pool.evictions for pool in pools),
        )


def _seed_of(sequence: Sequence, sample_id: int) -> int:
    """Of another sample of the request: its ids, and so their seeds, follow one another."""
    return (sequence.sampler.seed + sample_id - sequence.id) % 2**64


def _noted_prompt(sequence: Sequence) -> tuple[Draw, ...] | None:
    asked = sequence.request.params.prompt_logprobs is not None
    return tuple(sequence.prompt_logprobs) if asked else None


def _kind(item: Scheduled) -> RowKind:
    if not item.sequence.decoding:
        return "prefill"
    return "decode" if item.rows == 1 else "verify"


def _rows_of(logits: np.ndarray, rows: list[int]) -> np.ndarray:
    """The chosen rows, without a copy where they stand one after the other."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return logits[rows[0] : rows[0] + len(rows)]
    return logits[rows]
