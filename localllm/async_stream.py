"""What `AsyncEngine` gives to its callers: an answer, or the engine's events, as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from localllm.answer import Answer, best
from localllm.engine.events import EngineEvent, EventBus
from localllm.errors import InvalidRequest
from localllm.pump import Pump
from localllm.results import GenerationDelta, GenerationResult


class Bell:
    """Wakes coroutines of any event loop from any thread. Takes no lock."""

    def __init__(self) -> None:
        self._waiters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    def ring(self) -> None:
        while self._waiters:
            with suppress(IndexError, RuntimeError):  # another ring was first; its loop is closed
                loop, future = self._waiters.popleft()
                loop.call_soon_threadsafe(_wake, future)

    async def wait(self, ready: Callable[[], bool]) -> None:
        """Sleeps until `ready`; whoever makes it so rings afterwards."""
        loop = asyncio.get_running_loop()
        while not ready():
            waiter = (loop, loop.create_future())
            self._waiters.append(waiter)
            try:
                if not ready():  # it may have become so just before the bell knew of us
                    await waiter[1]
            finally:
                with suppress(ValueError):
                    self._waiters.remove(waiter)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Call:
    """A request on its way: what the engine knows of it.

    The engine does not know the `AsyncStream`, so that one which nobody holds is noticed.
    """

    def __init__(self, pump: Pump, deadline: float | None) -> None:
        self.bell = Bell()
        self.accepted = False
        self.error: Exception | None = None  # it did not come as far as the engine
        self.answers: list[Answer] = []  # once it is prepared
        self.whole = False  # nobody asks for its deltas
        self._pump = pump
        self._deadline = deadline
        self._cancelled = False
        self._on_done: Callable[[Call], None] = lambda _: None

    @property
    def done(self) -> bool:
        return self.error is not None or (
            bool(self.answers) and all(answer.done for answer in self.answers)
        )

    @property
    def news(self) -> bool:
        failed = any(answer.error is not None for answer in self.answers)
        return self.done or failed or any(answer.deltas for answer in self.answers)

    def bind(self, answers: list[Answer], on_done: Callable[[Call], None]) -> None:
        """Before they are given to the pump. on_done: called by the thread that ends it."""
        self._on_done = on_done
        for answer in answers:
            answer.deadline = self._deadline
            answer.on_news = self._tell
        self.answers = answers
        if self._cancelled:
            for answer in self.answers:
                answer.cancel_requested = True

    def accept(self) -> None:
        self.accepted = True
        self.bell.ring()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.answers = []
        self.bell.ring()

    def cancel(self) -> None:
        self._cancelled = True  # before `answers` is read: `bind` does it the other way round
        self._pump.cancel(self.answers)

    def _tell(self) -> None:
        """In the thread that runs the engine, which must not be held up."""
        if self.done:
            self._on_done(self)
            for answer in self.answers:
                answer.on_news = None
        elif self.whole:
            for answer in self.answers:
                answer.deltas.clear()
            return
        self.bell.ring()


class AsyncStream:
    """An asynchronous iterator over the deltas of one answer, or of `n`, each by its `sample`.

    Deltas that were not read in time come as one, so that a slow reader holds nobody up and costs
    no more memory than the answer is long. The last delta has the `result`.

    The request runs from the moment it was made, read or not. It ends, and its blocks are free, by
    `cancel()` (what was said so far still comes, with the result), by `aclose()` or `async with`,
    by cancelling a task that waits in it, and once nobody holds the stream any more: so `break` in
    `async for delta in engine.generate(…)` ends it too. Its step is stopped within a layer of the
    model if no other request is in it, and finished first if there is one.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._over = False

    @property
    def result(self) -> GenerationResult | None:
        """The whole answer, once there is one; if there are several, when all are whole."""
        answers = self._call.answers
        whole = answers and all(answer.result is not None for answer in answers)
        return best(answers) if whole else None

    @property
    def news(self) -> bool:
        """Whether the next delta, or the end, comes without waiting."""
        return self._over or self._call.news

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> GenerationDelta:
        call = self._call
        while not self._over:
            await self._wait(lambda: call.news)
            if call.answers and len(call.answers) > call.answers[0].n:
                await self.aclose()
                raise InvalidRequest("best_of above n cannot be streamed", hint="use complete")
            for answer in call.answers:
                delta = answer.take()
                if delta is not None:
                    return delta
            if call.done or any(answer.error is not None for answer in call.answers):
                self._over = True
                self._raise()
        raise StopAsyncIteration

    async def accepted(self) -> AsyncStream:
        """Returns once the request is checked and queued.

        Raises what is wrong with it: `InvalidRequest`, `PromptTooLong`, `TemplateError`.
        """
        await self._wait(lambda: self._call.accepted or self._call.error is not None)
        if self._call.error is not None:
            self._over = True
            raise self._call.error
        return self

    async def whole(self) -> GenerationResult:
        """Reads to the end: the whole answer. Raises what iterating would."""
        self._call.whole = True
        await self._wait(lambda: self._call.done)
        self._over = True
        self._raise()
        result = self.result
        assert result is not None
        return result

    def cancel(self) -> None:
        """From any thread: ends the request soon, with what it has."""
        self._call.cancel()

    async def aclose(self) -> None:
        """Ends the request; when this returns it is out of the engine."""
        self._over = True
        self._call.whole = True
        self._call.cancel()
        await self._call.bell.wait(lambda: self._call.done)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._over and not self._call.done:
            self._call.cancel()

    async def _wait(self, ready: Callable[[], bool]) -> None:
        try:
            await self._call.bell.wait(ready)
        except BaseException:  # the task that waits is cancelled
            self._over = True
            self._call.whole = True
            self._call.cancel()
            raise

    def _raise(self) -> None:
        for error in (self._call.error, *(answer.error for answer in self._call.answers)):
            if error is not None:
                self._call.cancel()
                raise error


class AsyncWatch:
    """The engine's events as an asynchronous iterator, until the engine is closed.

    dropped: events lost because more than `capacity` waited.
    """

    def __init__(
        self, bus: EventBus, capacity: int, bells: set[Bell], ended: Callable[[], bool]
    ) -> None:
        self._bell = Bell()
        self._bus = bus
        self._bells = bells
        self._ended = ended
        self._closed = False
        self._events: deque[EngineEvent] = deque()
        self._watch = bus.watch(capacity, self._bell.ring)
        bells.add(self._bell)

    @property
    def dropped(self) -> int:
        return self._watch.dropped

    def __aiter__(self) -> AsyncWatch:
        return self

    async def __anext__(self) -> EngineEvent:
        await self._bell.wait(lambda: self._fill() or self._closed or self._ended())
        if self._fill():
            return self._events.popleft()
        self.close()
        raise StopAsyncIteration

    def close(self) -> None:
        self._closed = True
        self._bus.unwatch(self._watch)
        self._bells.discard(self._bell)
        self._bell.ring()

    async def aclose(self) -> None:
        self.close()

    async def __aenter__(self) -> AsyncWatch:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _fill(self) -> bool:
        if not self._events:
            self._events.extend(self._watch.take())
        return bool(self._events)
