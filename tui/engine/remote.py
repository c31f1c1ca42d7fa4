"""`RemoteEngine`: the engine in a child process, for an asyncio app."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from localllm.tui.engine.client import (
    Count,
    EngineEvents,
    EngineGone,
    EngineState,
    Finished,
    Json,
    KvBlock,
    KvMap,
    Listener,
    ModelInfo,
    News,
    Piece,
    TokenInfo,
    ToolCall,
)
from localllm.tui.engine.cores import Cores
from localllm.tui.engine.wire import MAX_LINE, error_from, line, message_of

_LAST_WORDS = 20  # lines of a dead child's stderr that are told
_MAX_WAITING = 64  # pieces of one answer that nobody reads; further ones become one
_CLOSE_SECONDS = 1.5


class RemoteAsked:
    """See `Asked`. Ended by the engine's death with EngineGone."""

    def __init__(self, engine: RemoteEngine, number: int) -> None:
        self._engine = engine
        self._number = number
        self._pieces: deque[Piece] = deque()
        self._news = asyncio.Event()
        self._over = False
        self._error: BaseException | None = None
        self._stopped = False
        self._sent = False
        self.result: dict[int, Finished] = {}

    def stop(self) -> None:
        self._stopped = True
        if self._sent and not self._over:
            self._engine.post({"do": "stop", "ask": self._number})

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while True:
                while self._pieces:
                    yield self._pieces.popleft()
                if self._over:
                    break
                self._news.clear()
                await self._news.wait()
        finally:
            if not self._over:
                self.stop()  # nobody will read the rest
        if self._error is not None:
            raise self._error

    def sent(self) -> None:
        self._sent = True
        if self._stopped:
            self.stop()

    def take(self, pieces: Sequence[Mapping[str, Any]]) -> None:
        for piece in map(_piece, pieces):
            last = self._pieces[-1] if len(self._pieces) >= _MAX_WAITING else None
            if last is not None and last.index == piece.index:  # nobody reads: none is lost
                self._pieces[-1] = Piece(
                    last.index,
                    last.text + piece.text,
                    last.reasoning + piece.reasoning,
                    last.tokens + piece.tokens,
                )
            else:
                self._pieces.append(piece)
        self._news.set()

    def end(self, answer: Mapping[str, Any]) -> None:
        for index, fields in enumerate(answer.get("finished") or ()):
            if fields is not None:
                self.result[index] = _finished(fields)
        self._over = True
        self._news.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._over = True
        self._news.set()


class RemoteEngine:
    """Begins its child with the first `open`. All of it belongs to one event loop.

    command: what to run as the child, for tests. cores: with which its own event loop runs.
    """

    def __init__(self, command: Sequence[str] | None = None, cores: Cores | None = None) -> None:
        self._command = tuple(command or (sys.executable, "-m", "localllm.tui.engine"))
        self._inherited: tuple[int, ...] = ()
        if cores is not None:
            self._inherited = (cores.file,)
            self._command += (str(cores.file),)
        self._state = EngineState()
        self._listeners: list[Listener] = []
        self._process: asyncio.subprocess.Process | None = None
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._asked: dict[int, RemoteAsked] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._wish: tuple[str, dict[str, Any]] | None = None
        self._closing = False

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def pid(self) -> int | None:
        """Of the child, while there is one."""
        return None if self._process is None else self._process.pid

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        self._listeners.append(listener)

        def leave() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return leave

    # ---- life

    async def open(self, model: str, **options: Any) -> None:
        self._wish = model, options
        self._tell(EngineState("starting" if self._process is None else "loading", model))
        await self._start()
        await self._call("open", model=model, options=options)

    async def restart(self) -> None:
        if self._wish is None:
            raise EngineGone("no model was chosen yet", hint="choose one: /model")
        await self._stop()
        model, options = self._wish
        await self.open(model, **options)

    async def close(self) -> None:
        self._closing = True
        await self._stop()

    # ---- requests

    def ask(
        self,
        messages: Sequence[Json],
        params: Json,
        *,
        adapter: str | None = None,
        adapter_weight: float = 1.0,
        n: int = 1,
        tools: Sequence[Json] = (),
        continue_last: bool = False,
        logprobs: int = 0,
    ) -> RemoteAsked:
        number = next(self._numbers)
        asked = RemoteAsked(self, number)
        self._asked[number] = asked
        message = {
            "messages": list(messages),
            "params": dict(params),
            "adapter": adapter,
            "adapter_weight": adapter_weight,
            "n": n,
            "tools": list(tools),
            "continue_last": continue_last,
            "logprobs": logprobs,
        }
        self._spawn(self._ask(number, asked, message))
        return asked

    async def _ask(self, number: int, asked: RemoteAsked, message: dict[str, Any]) -> None:
        try:
            asked.end(await self._call("ask", number, asked.sent, **message))
        except BaseException as error:
            asked.fail(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._asked.pop(number, None)

    async def count(self, messages: Sequence[Json], tools: Sequence[Json] = ()) -> Count:
        found = await self._call("count", messages=list(messages), tools=list(tools))
        return Count(found["total"], tuple(found["per_message"]), found["cached"], found["context"])

    async def tokens(self, text: str) -> int:
        return int(await self._call("tokens", text=text))

    async def kv_map(self) -> KvMap:
        found = await self._call("kv_map")
        groups = [group for group, size in enumerate(found["groups"]) for _ in range(size)]
        blocks = [KvBlock(number, group, 0, (), "") for number, group in enumerate(groups)]
        for number, refcount, owners, name in found["blocks"]:
            blocks[number] = KvBlock(number, groups[number], refcount, tuple(owners), name)
        return KvMap(tuple(blocks), found["block_size"])

    async def block_text(self, block: int) -> str:
        return str(await self._call("block_text", block=block))

    async def load_adapter(self, path: str) -> str:
        return str(await self._call("load_adapter", path=path))

    async def unload_adapter(self, name: str) -> None:
        await self._call("unload_adapter", name=name)

    async def adapters(self) -> list[str]:
        return list(await self._call("adapters"))

    # ---- the child

    async def _start(self) -> None:
        if self._process is not None:
            return
        self._words.clear()
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE,
            pass_fds=self._inherited,
            start_new_session=True,  # Ctrl-C in the terminal is the app's
        )
        self._process = process
        self._spawn(self._read(process))
        self._spawn(self._listen(process))

    async def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _CLOSE_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self._gone(process, EngineGone("the engine was closed"))

    async def _call(
        self,
        do: str,
        number: int | None = None,
        sent: Callable[[], None] | None = None,
        **args: Any,
    ) -> Any:
        process = self._process
        if process is None:
            raise self._death()
        number = next(self._numbers) if number is None else number
        data = line({"id": number, "do": do, **args})
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            assert process.stdin is not None
            process.stdin.write(data)
            if sent is not None:
                sent()
            with contextlib.suppress(ConnectionError):  # its death is told by whoever reads
                await process.stdin.drain()
            return await future
        finally:
            self._waiting.pop(number, None)

    def post(self, message: Mapping[str, Any]) -> None:
        """Sends what has no answer."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(line(message))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                data = await process.stdout.readuntil(b"\n")
            except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
                break
            message = message_of(data)
            if message is not None:
                self._take(message)
        code = await process.wait()
        await asyncio.sleep(0)  # the last of stderr
        if self._process is process:
            error = EngineGone(_why(code, self._words), hint="/restart starts it again")
            self._gone(process, error)
            if not self._closing:
                self._tell(EngineState("dead", model=None, error=str(error), hint=error.hint))

    def _take(self, message: Mapping[str, Any]) -> None:
        number = message.get("id")
        if "state" in message:
            self._tell(_state(message["state"]))
        elif "events" in message:
            events = tuple((str(name), fields) for name, fields in message["events"])
            self._news(EngineEvents(events, int(message.get("dropped", 0))))
        elif "pieces" in message:
            if number in self._asked:
                self._asked[number].take(message["pieces"])
        elif number in self._waiting and not self._waiting[number].done():
            if "error" in message:
                self._waiting[number].set_exception(error_from(message["error"]))
            else:
                self._waiting[number].set_result(message.get("ok"))

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while True:
            try:
                data = await process.stderr.readline()
            except (ValueError, ConnectionError):  # a line beyond all bounds
                continue
            if not data:
                return
            self._words.append(data.decode(errors="replace").rstrip()[:500])

    def _gone(self, process: asyncio.subprocess.Process, error: EngineGone) -> None:
        if self._process is process:
            self._process = None
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()

    def _death(self) -> EngineGone:
        error, hint = self._state.error, self._state.hint
        return EngineGone(error or "the engine is not running", hint=hint)

    # ---- news

    def _tell(self, state: EngineState) -> None:
        if state.phase != "ready" and state.model is None and state.phase != "dead":
            state = replace(state, model=self._state.model)
        self._state = state
        self._news(state)

    def _news(self, news: News) -> None:
        for listener in list(self._listeners):
            listener(news)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _state(fields: Mapping[str, Any]) -> EngineState:
    model = fields.get("model")
    return EngineState(
        phase=fields["phase"],
        detail=str(fields.get("detail", "")),
        fraction=fields.get("fraction"),
        model=None if model is None else ModelInfo(**model),
        error=fields.get("error"),
        hint=fields.get("hint"),
    )


def _piece(fields: Mapping[str, Any]) -> Piece:
    tokens = tuple(
        TokenInfo(
            int(one["id"]),
            str(one["text"]),
            one.get("logprob"),
            tuple((int(i), str(text), float(value)) for i, text, value in one.get("top") or ()),
            one.get("drafted", ""),
        )
        for one in fields["tokens"]
    )
    return Piece(int(fields["index"]), fields["text"], fields["reasoning"], tokens)


def _finished(fields: Mapping[str, Any]) -> Finished:
    calls = tuple(ToolCall(**one) for one in fields.get("tool_calls") or ())
    return Finished(fields["reason"], fields["receipt"], calls, fields.get("seed"))


def _why(code: int, words: Sequence[str]) -> str:
    """How a child came to its end, in words."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        how = f"was ended by {name}"
        if -code == signal.SIGKILL:
            how += " (the system does that when memory runs out)"
    else:
        how = f"ended with exit code {code}"
    last = next((word for word in reversed(words) if word.strip()), "")
    return f"the engine {how}" + (f": {last}" if last else "")
