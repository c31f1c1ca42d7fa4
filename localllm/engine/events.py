"""What goes on in the engine, for those who watch: the chat app, metrics, tests.

Watching never holds the engine up: a reader that is slow loses the oldest events and is told how
many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock, RLock
from typing import Literal

from localllm.engine.receipt import Receipt

RowKind = Literal["prefill", "decode", "verify"]


@dataclass(frozen=True)
class Queued:
    request_id: int
    prompt_tokens: int
    priority: int


@dataclass(frozen=True)
class Started:
    """Admitted to the batch, for the first time or again. cached_tokens: not to be computed."""

    request_id: int
    cached_tokens: int


@dataclass(frozen=True)
class Preempted:
    """Blocks ran out, and this request gave way. It goes on later."""

    request_id: int


@dataclass(frozen=True)
class Forked:
    request_id: int
    parent_id: int


@dataclass(frozen=True)
class Ended:
    request_id: int
    reason: str
    receipt: Receipt


@dataclass(frozen=True)
class BatchRow:
    """One sequence's part of a step. kind: what its rows were for."""

    request_id: int
    kind: RowKind
    rows: int
    accepted_drafts: int


@dataclass(frozen=True)
class StepDone:
    """A step: who was in it, seconds spent, and the state of the KV pools after it.

    model_seconds: in the backend's forward; total_seconds: with drafting, scheduling, sampling.
    blocks_in_use, blocks_idle (kept for reuse), blocks: over all KV groups. evictions: so far.
    """

    batch: tuple[BatchRow, ...]
    model_seconds: float
    total_seconds: float
    waiting: int
    running: int
    blocks_in_use: int
    blocks_idle: int
    blocks: int
    evictions: int


EngineEvent = Queued | Started | Preempted | Forked | Ended | StepDone


class Watch:
    """A bounded queue of events, filled by the engine and read from any thread.

    dropped: events lost because they were not read in time. on_event: called after each, by the
    thread that runs the engine; it must neither wait nor raise.
    """

    def __init__(self, capacity: int, on_event: Callable[[], None] | None = None) -> None:
        self._events: deque[EngineEvent] = deque(maxlen=capacity)
        self._lock = Lock()
        self._on_event = on_event
        self.dropped = 0

    def take(self) -> list[EngineEvent]:
        """Everything since the last call, oldest first."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
            return events

    def __iter__(self) -> Iterator[EngineEvent]:
        return iter(self.take())

    def put(self, event: EngineEvent) -> None:
        with self._lock:
            self.dropped += len(self._events) == self._events.maxlen
            self._events.append(event)
        if self._on_event is not None:
            self._on_event()


class EventBus:
    """Hands every event to every watch. Costs nothing while there is none."""

    def __init__(self) -> None:
        self._watches: tuple[Watch, ...] = ()
        self._lock = RLock()  # a watch may be given up by the garbage collector

    @property
    def watched(self) -> bool:
        return bool(self._watches)

    def watch(self, capacity: int = 1024, on_event: Callable[[], None] | None = None) -> Watch:
        watch = Watch(capacity, on_event)
        with self._lock:
            self._watches = (*self._watches, watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        with self._lock:
            self._watches = tuple(w for w in self._watches if w is not watch)

    def emit(self, event: EngineEvent) -> None:
        for watch in self._watches:
            watch.put(event)
