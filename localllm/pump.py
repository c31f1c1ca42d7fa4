"""Drives the engine from whichever threads wait for answers.

There is no background thread: a caller that needs an answer advances the engine, for everyone,
until its own has news. Callers on several threads are thereby batched together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from threading import Lock
from typing import TypeVar

from localllm.answer import Answer
from localllm.engine import Engine, Finished, Request, Token
from localllm.errors import LocalLLMError
from localllm.results import GenerationDelta, GenerationResult
from localllm.sampling import SamplingParams

T = TypeVar("T")


class Pump:
    """A lock around the engine, and the answers its events belong to."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = Lock()
        self._answers: dict[int, Answer] = {}
        self._closed = False

    def submit(self, requests: list[tuple[Request, list[Answer]]]) -> None:
        """Queues all of them, or none if one is refused. Each has an answer for every sample."""
        with self._lock:
            self._check_open()
            for request, _ in requests:
                self._engine.check(request)
            for request, answers in requests:
                first = self._engine.add(request)
                self._answers.update(enumerate(answers, start=first))

    def wait(self, answers: list[Answer]) -> None:
        """Runs steps until one of these answers has news."""
        while not any(answer.news for answer in answers):
            with self._lock:
                if any(answer.news for answer in answers):
                    return
                self._check_open()
                self._end_cancelled()
                for event in self._engine.step():
                    self._route(event)

    def cancel(self, answers: list[Answer]) -> None:
        """From any thread or a signal handler: these end before the next step, and soon."""
        going_on = [answer for answer in answers if not answer.done]
        for answer in going_on:
            answer.cancel_requested = True
        if going_on:
            self._engine.cancel_step()

    def end(self, answers: list[Answer]) -> None:
        """Ends these now; what they have is kept as their results."""
        self.cancel(answers)
        with self._lock:
            self._end_cancelled()

    def alone(self, work: Callable[[Engine], T]) -> T:
        """Runs `work` with the engine to itself, between steps."""
        with self._lock:
            self._check_open()
            return work(self._engine)

    def close(self) -> None:
        """Ends every request and refuses new ones. Waits until a running step has stopped."""
        self.cancel(list(self._answers.values()))
        with self._lock:
            for answer in self._answers.values():
                answer.cancel_requested = True
            self._end_cancelled()
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise LocalLLMError("this model is closed", hint="create a new LLM")

    def _end_cancelled(self) -> None:
        for request_id in [i for i, a in self._answers.items() if a.cancel_requested]:
            finished = self._engine.end(request_id)
            assert finished is not None
            self._route(finished)

    def _route(self, event: Token | Finished) -> None:
        answer = self._answers.get(event.request_id)
        if answer is None:  # ended by a stop string earlier in this step
            return
        if isinstance(event, Finished):
            del self._answers[event.request_id]
            answer.finish(event)
        elif answer.push(event.draw):
            finished = self._engine.end(event.request_id, "stop", "stop string")
            if finished is not None:
                self._route(finished)


class Stream:
    """An iterator over the deltas of one or several answers, in order of arrival.

    `cancel()` may be called from any thread or a signal handler: the step under way stops within a
    layer of the model, the answers end, and the deltas that finish them (with what was said so far)
    still come. Leaving the iterator early (`close()`, `with`, garbage collection) ends the requests
    too.
    """

    def __init__(self, pump: Pump, answers: list[Answer]) -> None:
        self._pump = pump
        self._answers = answers
        self._deltas = self._run()

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

    def _run(self) -> Generator[GenerationDelta, None, None]:
        open_answers = list(self._answers)
        try:
            while open_answers:
                self._pump.wait(open_answers)
                for answer in list(open_answers):
                    while answer.deltas:
                        yield answer.deltas.popleft()
                    if answer.error is not None:
                        raise answer.error
                    if answer.done and not answer.deltas:
                        open_answers.remove(answer)
        finally:
            self._pump.end(open_answers)


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
