"""`AsyncEngine`: a model for programs built on asyncio, such as a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Condition, Thread
from typing import Any, Unpack

from localllm.answer import Detokenizer
from localllm.async_stream import AsyncStream, AsyncWatch, Bell, Call
from localllm.errors import InvalidRequest, LocalLLMError, TooManyRequests
from localllm.llm import LLM, Message, Options, Prompt
from localllm.pump import Load, Work
from localllm.results import GenerationResult
from localllm.sampling import SamplingParams
from localllm.tokenizer.reasoning import Reasoning

# Threads that compile grammars: a slow one must not hold up all others. Prompts that only need to
# be tokenized have one thread, so that they stay in the order in which they came.
_COMPILERS = 4


class AsyncEngine:
    """Answers any number of asyncio callers, on one or several event loops, in one batch.

        async with AsyncEngine("smollm2:135m") as engine:
            async for delta in engine.generate("Once upon a time"):
                print(delta.text, end="")

    model: what `LLM` takes, with the same `options`, or an `LLM`, which stays its owner's and may
        be used beside this.
    max_waiting: requests that may wait for a place in the batch; None for no limit. Further ones
        are refused with `TooManyRequests`.

    One thread loads the model, runs steps while there are requests, and sleeps otherwise. To the
    `Pump` it is one more caller: synchronous calls go on driving the engine themselves when it
    does not. The other way round, with `LLM` waiting for this thread, would be no simpler: every
    script would need a thread and a handover for each token, while a signal stops a step within a
    layer only where the main thread runs it or waits for it, and both would have to be kept.
    """

    def __init__(self, model: str | LLM, *, max_waiting: int | None = 1024, **options: Any) -> None:
        if max_waiting is not None and max_waiting < 0:
            raise InvalidRequest(f"max_waiting must not be negative, but is {max_waiting}")
        if isinstance(model, LLM) and options:
            raise InvalidRequest(f"the model is loaded; too late for {', '.join(options)}")
        self._max_waiting = max_waiting
        self._own = not isinstance(model, LLM)
        self._load: Callable[[], LLM] = (
            (lambda: model) if isinstance(model, LLM) else lambda: LLM(model, **options)
        )
        self._llm: LLM | None = None
        self._failure: BaseException | None = None
        self._thread: Thread | None = None
        self._bell = Bell()  # rung when the model is loaded, and when all is over
        self._bells: set[Bell] = set()  # of watches
        self._condition = Condition()  # of what follows
        self._closing = False
        self._stopped = False
        self._preparing: set[Call] = set()
        self._running: set[Call] = set()  # known to the pump; whoever runs the engine takes out
        self._tokenizing: ThreadPoolExecutor | None = None
        self._compiling: ThreadPoolExecutor | None = None

    # ---- life

    async def start(self) -> AsyncEngine:
        """Loads the model, beside the event loop. Raises what `LLM` does. `async with` calls it."""
        with self._condition:  # several event loops may begin together
            if self._thread is None and not self._closing:
                self._tokenizing = ThreadPoolExecutor(1, "localllm-tokenize")
                self._compiling = ThreadPoolExecutor(_COMPILERS, "localllm-compile")
                self._thread = Thread(target=self._run, name="localllm-engine", daemon=True)
                self._thread.start()
        try:
            await self._bell.wait(lambda: self._llm is not None or self._closing)
        except BaseException:
            self._begin_close()
            raise
        if self._closing:
            await self.close()
            if self._failure is not None:
                raise self._failure
        assert self.llm is not None  # raises if it is closed
        return self

    async def close(self) -> None:
        """Ends running requests with what they have, and the thread. Idempotent."""
        self._begin_close()
        if self._thread is not None:
            await self._bell.wait(lambda: self._stopped)
            self._thread.join()

    async def __aenter__(self) -> AsyncEngine:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def llm(self) -> LLM:
        """The model, to be used from any thread while this is open."""
        if self._llm is None or self._closing:
            raise LocalLLMError(
                "this engine is closed or was not started", hint="use it inside `async with`"
            )
        return self._llm

    # ---- requests

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        detokenizer: Callable[[], Detokenizer] | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """Completes one prompt (text or token ids): an asynchronous iterator of deltas.

        timeout: seconds from now after which it is cancelled, with what it has;
        `receipt.stopped_by` then is "timeout". It is looked at between steps. detokenizer: makes
        what turns an answer's tokens into text, None for the tokenizer's own. options: see
        `localllm.llm.Options`.

        Raises `TooManyRequests` here; what is wrong with the request (`InvalidRequest`,
        `PromptTooLong`) the stream raises, since the prompt is tokenized beside the event loop.
        """
        llm = self.llm
        return self._begin(
            lambda: llm.prepare(prompt, params, options, detokenizer=detokenizer), params, timeout
        )

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        reasoning: Reasoning | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """Answers a conversation, as `LLM.chat`; in pieces, or by `await ….whole()` at once."""
        llm = self.llm

        def prepare() -> Work:
            ids = llm.chat_prompt(messages, tools, template_vars, reasoning)
            return llm.prepare(ids, params, options, reader=llm.reader(ids, tools))

        return self._begin(prepare, params, timeout)

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> GenerationResult:
        """As `generate`, giving the whole answer."""
        return await self.generate(prompt, params, timeout=timeout, **options).whole()

    def cancel(self, stream: AsyncStream) -> None:
        """Ends a request soon, with what it has. From any thread."""
        stream.cancel()

    # ---- what goes on

    def watch(self, capacity: int = 1024) -> AsyncWatch:
        """The engine's events from now on; the oldest are lost when more than so many wait."""
        return AsyncWatch(self.llm.pump.events, capacity, self._bells, lambda: self._stopped)

    def stats(self) -> Load:
        """The queue, the batch and the KV blocks, at about this moment."""
        load = self.llm.pump.load()
        return replace(load, waiting=load.waiting + len(self._preparing))

    # ---- inside

    def _begin(
        self, prepare: Callable[[], Work], params: SamplingParams | None, timeout: float | None
    ) -> AsyncStream:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._condition:
            pump = self.llm.pump
            executor = self._compiling if _compiles(params) else self._tokenizing
            assert executor is not None
            limit = self._max_waiting
            if limit is not None and pump.queued(len(self._preparing) + 1) > limit:
                raise TooManyRequests(
                    f"{limit} requests wait already", hint="try again when some have been answered"
                )
            call = Call(pump, deadline)
            self._preparing.add(call)
            executor.submit(self._prepare, call, prepare)
        return AsyncStream(call)

    def _prepare(self, call: Call, prepare: Callable[[], Work]) -> None:
        """In another thread: text becomes token ids, a grammar an automaton."""
        assert self._llm is not None
        pump = self._llm.pump
        try:
            work = prepare()
            pump.check([work])
            call.bind(work[1], self._running.discard)
            with self._condition:  # at every moment it counts once
                pump.take_in([work])
                self._preparing.discard(call)
                self._running.add(call)
                if call.done:  # already, by a synchronous caller's step
                    self._running.discard(call)
                self._condition.notify()
        except Exception as error:
            self._preparing.discard(call)
            call.fail(error)
        else:
            call.accept()

    def _begin_close(self) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._bell.ring()

    def _run(self) -> None:
        """The engine's thread."""
        llm = None
        try:
            llm = self._llm = self._load()
            self._bell.ring()
            self._serve(llm)
        except BaseException as error:
            self._failure = error
        finally:
            self._end(llm)

    def _serve(self, llm: LLM) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._running or self._closing)
                if self._closing:
                    return
            try:
                llm.pump.drive(lambda: self._closing or not self._running)
            except Exception as error:  # nobody shall wait for a thread that cannot go on
                for call in list(self._running):
                    call.fail(error)
                    self._running.discard(call)

    def _end(self, llm: LLM | None) -> None:
        try:
            self._begin_close()
            for executor in (self._tokenizing, self._compiling):
                assert executor is not None
                executor.shutdown()  # those on their way come to the pump, and end there
            if llm is not None:
                calls = list(self._running)
                llm.pump.end([answer for call in calls for answer in call.answers])
                if self._own:
                    llm.close()
        finally:
            self._stopped = True
            for bell in (self._bell, *list(self._bells)):
                bell.ring()


def _compiles(params: SamplingParams | None) -> bool:
    """Whether these parameters need the vocabulary."""
    return isinstance(params, SamplingParams) and (params.constrained or params.dry_multiplier != 0)
