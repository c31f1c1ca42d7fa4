"""Drives the engine from whichever threads wait for answers.

A caller that needs an answer advances the engine, for everyone, until its own has news; meanwhile
the other callers sleep. Callers on several threads are thereby batched together. Scripts need no
background thread, and the one of `AsyncEngine` is one more caller.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

from localllm.answer import Answer
from localllm.engine import Engine, Finished, Request, Token
from localllm.engine.events import EventBus
from localllm.errors import LocalLLMError
from localllm.results import GenerationDelta, GenerationResult
from localllm.sampling import SamplingParams
from localllm.turns import Turns

T = TypeVar("T")
Work = tuple[Request, list[Answer]]  # an answer for each of its samples


@dataclass(frozen=True)
class Load:
    """How much there is to do, at some recent moment.

    waiting: requests that are not in the batch; running: sequences in it. blocks_in_use,
    blocks_idle (kept for reuse), blocks: over all KV groups.
    """

    waiting: int
    running: int
    blocks_in_use: int
    blocks_idle: int
    blocks: int


class Pump:
    """The engine, whose turn it is to run it, and the answers its events belong to."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turns = Turns()
        self._intake = Lock()  # of the two that follow
        self._closed = False
        self._inbox: deque[Work] = deque()
        self._released = False  # some answer was, perhaps after the last look at them
        # What follows and the engine belong to the thread whose turn it is.
        self._answers: dict[int, Answer] = {}
        self._stuck = 0  # requests for which the last step had no place

    def submit(self, requests: list[Work]) -> None:
        """Queues all of them, or none if one is refused. Does not wait for a step."""
        self.check(requests)
        self.take_in(requests)

    def check(self, requests: list[Work]) -> None:
        self._check_open()
        for request, _ in requests:
            self._engine.check(request)

    def take_in(self, requests: list[Work]) -> None:
        """Queues what `check` let through."""
        with self._intake:
            self._check_open()
            self._inbox.extend(requests)

    def wait(self, answers: list[Answer]) -> None:
        """Until one of these answers has news; runs steps if no other thread does."""
        self.drive(lambda: any(answer.news for answer in answers))

    def drive(self, done: Callable[[], bool]) -> None:
        """Until `done`; runs steps if no other thread does."""
        while not done():
            try:
                if self._turns.take(done):
                    self._check_open()
                    while not done() and not self._turns.wanted:
                        self._step()
                        self._turns.wake()
                    self._settle()
            finally:
                self._give()

    def cancel(self, answers: list[Answer]) -> None:
        """From any thread or a signal handler: these end before the next step.

        The step under way is stopped only if nobody else is in it: it would have to be run again.
        """
        going_on = [answer for answer in answers if not answer.done]
        for answer in going_on:
            answer.cancel_requested = True
        under_way = list(self._answers.values())  # at once: other threads change it
        if going_on and under_way and all(answer.cancel_requested for answer in under_way):
            self._engine.cancel_step()

    def end(self, answers: list[Answer]) -> None:
        """Ends these now; what they have is kept as their results."""
        self.cancel(answers)

        def ended() -> bool:
            return all(answer.done for answer in answers)

        while not ended():
            try:
                if self._turns.take(ended):
                    self._settle()
            finally:
                self._give()

    def release(self, answers: list[Answer]) -> None:
        """As `end`, but never waits, so that the garbage collector may call it at any place.

        Where another thread runs the engine, that one ends them before its next step.
        """
        if all(answer.done for answer in answers):
            return
        self.cancel(answers)
        self._released = True
        self._tend()

    def alone(self, work: Callable[[Engine], T]) -> T:
        """Runs `work` with the engine to itself, between steps."""
        try:
            self._turns.take(lambda: False, urgent=True)
            self._check_open()
            return work(self._engine)
        finally:
            self._give()

    def close(self) -> None:
        """Ends every request and refuses new ones. Waits until a running step has stopped."""
        with self._intake:
            self._closed = True
        self.cancel(self._open_answers())
        try:
            self._turns.take(lambda: False, urgent=True)
            for answer in self._open_answers():
                answer.cancel_requested = True
            self._settle()
        finally:
            self._give()

    def load(self) -> Load:
        """Without waiting for a step, so the figures may be of moments that lie a little apart."""
        engine = self._engine
        return Load(
            waiting=len(engine.scheduler.waiting) + len(self._inbox),
            running=len(engine.scheduler.running),
            blocks_in_use=engine.cache.in_use,
            blocks_idle=engine.cache.idle,
            blocks=sum(pool.num_blocks for pool in engine.cache.pools),
        )

    def queued(self, coming: int = 0) -> int:
        """Requests that the next step has no place for, with so many that are still to come.

        Until a step has looked at them, all that the batch has room for count as placed.
        """
        fresh = len(self._inbox) + coming
        behind = self._stuck + fresh if self._stuck else 0
        return max(behind, len(self._answers) + fresh - self._engine.scheduler.max_batch)

    @property
    def events(self) -> EventBus:
        return self._engine.events

    def _open_answers(self) -> list[Answer]:
        inbox = [answer for _, answers in list(self._inbox) for answer in answers]
        return [*list(self._answers.values()), *inbox]

    def _give(self) -> None:
        self._turns.give()
        self._tend()

    def _tend(self) -> None:
        """Ends what was released. Whoever keeps another thread from it does it a moment later."""
        while self._released and self._turns.take_free():
            try:
                self._released = False
                self._settle()
            finally:
                self._turns.give()

    # ---- for the thread whose turn it is

    def _step(self) -> None:
        self._settle()
        try:
            if self._engine.busy:
                events = self._engine.step()
                self._stuck = len(self._engine.scheduler.waiting)
            elif self._answers:
                raise RuntimeError("the engine has lost requests")
            else:
                return
        except Exception as error:  # the engine's own fault: nobody shall wait for ever
            self._fail_all(error)
            return
        for event in events:
            self._route(event)

    def _settle(self) -> None:
        """Takes requests in, and ends those that are cancelled or out of time."""
        while self._inbox:
            request, answers = self._inbox.popleft()
            try:
                first = self._engine.add(request)
                self._answers.update(enumerate(answers, start=first))
            except Exception as error:  # what `check` could not see
                for answer in answers:
                    answer.fail(error)
        now = time.monotonic()
        over = [
            (request_id, "cancelled" if answer.cancel_requested else "timeout")
            for request_id, answer in self._answers.items()
            if answer.cancel_requested or (answer.deadline is not None and now >= answer.deadline)
        ]
        for request_id, by in over:
            finished = self._engine.end(request_id, "cancelled", by)
            assert finished is not None
            self._route(finished)
        if over:
            self._stuck = min(self._stuck, len(self._engine.scheduler.waiting))
            self._turns.wake()

    def _route(self, event: Token | Finished) -> None:
        answer = self._answers.get(event.request_id)
        if answer is None:  # ended by a stop string earlier in this step
            return
        if isinstance(event, Finished):
            del self._answers[event.request_id]
            answer.finish(event)
            return
        try:
            found = answer.push(event.draw, event.guess)
        except Exception as error:  # no text can be made of it; that is nobody else's trouble
            self._engine.end(event.request_id)
            del self._answers[event.request_id]
            answer.fail(error)
            return
        if found:
            finished = self._engine.end(event.request_id, "stop", "stop string")
            if finished is not None:
                self._route(finished)

    def _fail_all(self, error: Exception) -> None:
        for request_id, answer in list(self._answers.items()):
            with suppress(Exception):
                self._engine.end(request_id)
            del self._answers[request_id]
            answer.fail(error)

    def _check_open(self) -> None:
        if self._closed:
            raise LocalLLMError("this model is closed", hint="create a new LLM")


class Stream:
    """An iterator over the deltas of one or several answers, in order of arrival.

    `cancel()` may be called from any thread or a signal handler: the step under way stops within a
    layer of the model (if other requests are in it, it is finished first), the answers end, and the
    deltas that finish them (with what was said so far) still come. Leaving the iterator early
    (`close()`, `with`, garbage collection) ends the requests too.
    """

    def __init__(self, pump: Pump, answers: list[Answer]) -> None:
        self._pump = pump
        self._answers = answers
        self._deltas = _deltas(pump, answers)

    def __iter__(self) -> Iterator[GenerationDelta]:
        return self

    def __next__(self) -> GenerationDelta:
        return next(self._deltas)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self) -> None:
        self._pump.cancel(self._answers)

    def close(self) -> None:
        self._deltas.close()
        self._pump.end(self._answers)

    def __del__(self) -> None:
        self._pump.release(self._answers)


def _deltas(pump: Pump, answers: list[Answer]) -> Generator[GenerationDelta, None, None]:
    """Knows no `Stream`: together they would be a cycle, and wait for the garbage collector."""
    open_answers = list(answers)
    try:
        while open_answers:
            pump.wait(open_answers)
            for answer in list(open_answers):
                while answer.deltas:
                    yield answer.deltas.popleft()
                if answer.error is not None:
                    raise answer.error
                if answer.done and not answer.deltas:
                    open_answers.remove(answer)
    finally:  # maybe of the garbage collector, amid a step of this very thread
        pump.release(open_answers)


class InFlight:
    """Requests that come and go: others may be submitted while some run.

    Leaving the context ends those that still run. One thread uses it, except for `cancel`.
    """

    def __init__(
        self,
        pump: Pump,
        submit: Callable[[str | Sequence[int], SamplingParams | None], Answer],
    ) -> None:
        self._pump = pump
        self._submit = submit
        self._answers: dict[int, Answer] = {}
        self._submitted = 0

    def __len__(self) -> int:
        """Requests submitted and not yet taken."""
        return len(self._answers)

    def submit(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> int:
        """Queues a request and returns its number: 0, 1, … Raises as `LLM.generate` does."""
        answer = self._submit(prompt, params)
        number = self._submitted
        self._submitted += 1
        self._answers[number] = answer
        return number

    def finished(
        self, within: float | None = None
    ) -> list[tuple[int, GenerationResult | Exception]]:
        """Runs the requests until some have ended: their numbers, and results or what failed.

        Empty if none is left, or none ended within so many seconds.
        """
        until = None if within is None else time.monotonic() + within
        while self._answers:
            self._pump.wait(list(self._answers.values()))
            ended: list[tuple[int, GenerationResult | Exception]] = []
            for number, answer in list(self._answers.items()):
                answer.deltas.clear()
                outcome = answer.error or answer.result
                if outcome is not None:
                    del self._answers[number]
                    ended.append((number, outcome))
            if ended or (until is not None and time.monotonic() > until):
                return ended
        return []

    def cancel(self) -> None:
        """From any thread or a signal handler: what runs ends soon, with what it has."""
        self._pump.cancel(list(self._answers.values()))

    def close(self) -> None:
        self._pump.end(list(self._answers.values()))
        self._answers.clear()

    def __enter__(self) -> InFlight:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
