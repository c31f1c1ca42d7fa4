"""What the engine told of its last steps, kept for the screens that draw it. Bounded."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from localllm.tui.engine.client import Engine, EngineEvents, EngineState

STEPS = 512  # kept
REQUESTS = 32  # kept, those that ended first go first
_SPEED_SECONDS = 2.0  # over how much work a rate is taken


@dataclass(frozen=True)
class Row:
    """A request's part of a step. rows: tokens computed. kind: prefill, decode or verify."""

    request: int
    kind: str
    rows: int
    accepted: int

    @property
    def drafted(self) -> int:
        return self.rows - 1 if self.kind == "verify" else 0

    @property
    def produced(self) -> int:
        """Tokens of the answer; the last chunk of a prefill yields one that is counted later."""
        return 0 if self.kind == "prefill" else 1 + self.accepted


@dataclass(frozen=True)
class Step:
    """A step of the engine. seconds: all of it; model_seconds: in the forward pass."""

    number: int
    rows: tuple[Row, ...]
    seconds: float
    model_seconds: float
    waiting: int
    running: int
    blocks_in_use: int
    blocks_idle: int
    blocks: int
    evictions: int


@dataclass(frozen=True)
class Lane:
    """A request as the scheduler sees it. state: queued, running, preempted, or why it ended."""

    request: int
    prompt: int = 0
    cached: int = 0
    state: str = "queued"
    preemptions: int = 0
    parent: int | None = None
    ended: bool = False
    receipt: Mapping[str, Any] | None = None


class EngineTrace:
    """The last steps and requests, from the engine's events in the order they happened."""

    def __init__(self) -> None:
        self.steps: deque[Step] = deque(maxlen=STEPS)
        self.lanes: OrderedDict[int, Lane] = OrderedDict()
        self.lost = 0  # events that were dropped on the way
        self._number = 0

    def listen(self, told: EngineState | EngineEvents) -> None:
        """A listener of Engine.subscribe."""
        if not hasattr(told, "phase"):
            self.lost += told.dropped
            for name, event in told.events:
                self.add(name, event)

    def add(self, name: str, event: Mapping[str, Any]) -> None:
        """name: of the event's class in localllm/engine/events.py; event: its fields."""
        if name == "StepDone":
            self._step(event)
            return
        if name not in _STATES:
            return
        request = int(event["request_id"])
        lane = self.lanes.get(request) or Lane(request)
        if name == "Queued":
            lane = replace(lane, prompt=int(event["prompt_tokens"]))
        elif name == "Started":
            lane = replace(lane, state="running", cached=int(event["cached_tokens"]))
        elif name == "Preempted":
            lane = replace(lane, state="preempted", preemptions=lane.preemptions + 1)
        elif name == "Forked":
            lane = replace(lane, state="running", parent=int(event["parent_id"]))
        elif name == "Ended":
            receipt = event.get("receipt")
            lane = replace(
                lane,
                state=str(event["reason"]),
                ended=True,
                receipt=receipt if isinstance(receipt, Mapping) else None,
            )
        self.lanes[request] = lane
        self._bound()

    def clear(self) -> None:
        self.steps.clear()
        self.lanes.clear()
        self.lost = 0

    @property
    def last(self) -> Step | None:
        return self.steps[-1] if self.steps else None

    def speed(self) -> float | None:
        """Tokens per second of all answers together, over the last moments of work."""
        seconds = tokens = 0.0
        for step in reversed(self.steps):
            if not any(row.produced for row in step.rows):
                if seconds:
                    break
                continue
            seconds += step.seconds
            tokens += sum(row.produced for row in step.rows)
            if seconds >= _SPEED_SECONDS:
                break
        return tokens / seconds if seconds else None

    def speeds(self, group: int = 8) -> list[float]:
        """Tokens per second over groups of steps that produced some, the oldest first."""
        work = [step for step in self.steps if any(row.produced for row in step.rows)]
        rates = []
        for start in range(len(work) % group, len(work), group):
            part = work[start : start + group]
            seconds = sum(step.seconds for step in part)
            if seconds:
                rates.append(sum(row.produced for step in part for row in step.rows) / seconds)
        return rates

    def acceptance(self, request: int | None = None) -> list[float]:
        """Accepted of the drafted tokens, of every step that had some, the oldest first."""
        shares = []
        for step in self.steps:
            rows = [row for row in step.rows if row.drafted and request in (None, row.request)]
            if rows:
                shares.append(sum(r.accepted for r in rows) / sum(r.drafted for r in rows))
        return shares

    def _step(self, event: Mapping[str, Any]) -> None:
        self._number += 1
        rows = tuple(_rows(event["batch"]))
        numbers = (
            "waiting",
            "running",
            "blocks_in_use",
            "blocks_idle",
            "blocks",
            "evictions",
        )
        self.steps.append(
            Step(
                self._number,
                rows,
                float(event["total_seconds"]),
                float(event["model_seconds"]),
                **{name: int(event[name]) for name in numbers},
            )
        )
        for row in rows:
            lane = self.lanes.get(row.request)
            if lane is None:  # the watch began in the middle of it
                self.lanes[row.request] = Lane(row.request, state="running")
                self._bound()

    def _bound(self) -> None:
        while len(self.lanes) > REQUESTS:
            ended = (number for number, lane in self.lanes.items() if lane.ended)
            del self.lanes[next(ended, next(iter(self.lanes)))]


def why_no_guesses(
    trace: EngineTrace, receipt: Mapping[str, Any] | None, wish: str = "auto"
) -> str:
    """Why the last steps guessed nothing, in words, or what guessing brings if they did.

    wish: the chat's `speculation` parameter. The engine guesses where that shortens the time a
    token takes; so the reason is given in the times that its own steps took.
    """
    if wish == "off":
        return "Off: the chat's parameters turn speculation off."
    work = [step for step in trace.steps if any(row.produced for row in step.rows)]
    recent = work[-16:]
    guessing = [step for step in work if any(row.drafted for row in step.rows)]
    drafted = sum(row.drafted for step in guessing for row in step.rows)
    accepted = sum(row.accepted for step in guessing for row in step.rows)
    if not work:
        return "No answer yet in this session."
    if not drafted:
        if receipt and receipt.get("drafted_tokens"):
            name = receipt.get("drafter")
            return f"The last answer was guessed at by {name}; its steps are no longer kept."
        return (
            "Nothing to guess from: no draft model is loaded, and the text so far did not repeat "
            "itself. Answers that quote or rewrite their prompt are guessed at."
        )
    plain_steps = [step for step in work if step not in guessing]
    share = f"{accepted} of {drafted} guessed tokens were right ({accepted / drafted:.0%})"
    costs = _costs(guessing, plain_steps)
    if any(row.drafted for step in recent for row in step.rows):
        return f"On: {share}{costs}."
    return (
        f"Off since step {guessing[-1].number}: {share}{costs}. "
        "The engine guesses only where that is faster, and tries again now and then."
    )


_STATES = frozenset({"Queued", "Started", "Preempted", "Forked", "Ended"})


def _rows(batch: Iterable[Mapping[str, Any]]) -> Iterable[Row]:
    for row in batch:
        yield Row(
            int(row["request_id"]), str(row["kind"]), int(row["rows"]), int(row["accepted_drafts"])
        )


def _costs(guessing: list[Step], others: list[Step]) -> str:
    """The time a token took with guesses and without, where both were seen."""

    def per_token(steps: list[Step]) -> float:
        tokens = sum(row.produced for step in steps for row in step.rows)
        return 1000 * sum(step.seconds for step in steps) / max(tokens, 1)

    if not others:
        return f"; a token took {per_token(guessing):.1f} ms"
    return (
        f"; a token took {per_token(guessing):.1f} ms with guesses, "
        f"{per_token(others):.1f} ms without"
    )


_traces: WeakKeyDictionary[Engine, EngineTrace] = WeakKeyDictionary()


def trace_of(engine: Engine) -> EngineTrace:
    """The trace of an engine, which is kept from the first call on."""
    trace = _traces.get(engine)
    if trace is None:
        trace = _traces[engine] = EngineTrace()
        engine.subscribe(trace.listen)
    return trace
