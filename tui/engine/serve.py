"""The child process: reads requests, runs the model, writes what comes of it.

It ends when its stdin does, so that no engine outlives its app.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from localllm.async_engine import AsyncEngine
from localllm.async_stream import AsyncStream
from localllm.errors import InvalidRequest, LocalLLMError
from localllm.llm import LLM
from localllm.results import GenerationDelta, GenerationResult
from localllm.sampling import SamplingParams
from localllm.tokenizer import Tokenizer
from localllm.tui.engine.client import EngineGone
from localllm.tui.engine.thinking import ThinkingSplitter
from localllm.tui.engine.wire import MAX_LINE, error_fields, line, message_of

_PIECE_SECONDS = 0.02  # pieces are sent no more often, so that the app is not flooded
_EVENTS_SECONDS = 0.1
_PROGRESS_SECONDS = 0.1
_CLOSE_SECONDS = 0.8  # for what a KV disk still has to write
_MAX_ASKED = 64  # answers under way
_COUNTED = 64  # messages whose own tokens are told exactly; of older ones they are estimated

Fields = Mapping[str, Any]


class Progress:
    """Tells the app how far fetching is. Called from the loading thread."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._last = 0.0

    def say(self, text: str) -> None:
        self._tell({"phase": "loading", "detail": text})

    def update(self, label: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self._last < _PROGRESS_SECONDS and done != total:
            return
        self._last = now
        fraction = None if not total else min(1.0, done / total)
        self._tell({"phase": "fetching", "detail": label, "fraction": fraction})


class Server:
    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write_raw = write
        self._lock = threading.Lock()
        self._engine: AsyncEngine | None = None
        self._streams: dict[int, AsyncStream] = {}
        self._weighted: dict[tuple[str, float], str] = {}
        self._watching: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()

    def send(self, message: Fields) -> None:
        data = line(message)
        with self._lock:
            self._write_raw(data)

    def tell(self, state: Fields) -> None:
        self.send({"state": dict(state)})

    # ---- requests

    async def handle(self, message: Fields) -> None:
        """Answers one request. What goes wrong is its answer."""
        number, do = message.get("id"), message.get("do")
        handler = {
            "open": self._open,
            "ask": self._ask,
            "count": self._count,
            "tokens": self._tokens,
            "kv_map": self._kv_map,
            "block_text": self._block_text,
            "load_adapter": self._load_adapter,
            "unload_adapter": self._unload_adapter,
            "adapters": self._adapters,
        }.get(str(do))
        if do == "stop":
            if (stream := self._streams.get(int(message.get("ask", -1)))) is not None:
                stream.cancel()
            return
        try:
            if handler is None:
                raise InvalidRequest(f"the engine knows no {do!r}")
            self.send({"id": number, "ok": await handler(message)})
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.send({"id": number, "error": error_fields(error)})

    async def _open(self, message: Fields) -> None:
        async with self._opening:
            await self._close_engine()
            name = str(message["model"])
            self.tell({"phase": "loading", "detail": name})
            options = dict(message.get("options") or {})
            try:
                engine = AsyncEngine(
                    name, max_waiting=_MAX_ASKED, progress=Progress(self.tell), **options
                )
                await engine.start()
            except Exception as error:
                fields = error_fields(error)
                self.tell({"phase": "dead", "error": fields["message"], "hint": fields["hint"]})
                raise
            self._engine = engine
            self._watching = asyncio.create_task(self._watch(engine))
            info = engine.llm.info
            notes = [info.load_note]
            if info.backend_note:
                notes.insert(0, f"runs on {info.backend}: {info.backend_note}")
            model = {
                "name": info.name,
                "backend": info.backend,
                "context": info.context,
                "vocabulary": engine.llm.spec.vocab_size,
                "format": info.format,
                "path": info.path,
                "note": "; ".join(note for note in notes if note),
            }
            self.tell({"phase": "ready", "model": model})

    async def _ask(self, message: Fields) -> dict[str, Any]:
        """Pieces go out under the request's id; its answer is how each of them ended."""
        number, llm = int(message["id"]), self._llm
        if len(self._streams) >= _MAX_ASKED:
            raise InvalidRequest(f"{_MAX_ASKED} answers are under way already")
        params = _params(llm.default_params, message)
        adapter = await self._adapter(message.get("adapter"), message.get("adapter_weight", 1.0))
        prompt = await asyncio.to_thread(_prompt, llm, message)
        assert self._engine is not None
        stream = self._engine.generate(prompt, params, adapter=adapter)
        self._streams[number] = stream
        try:
            end = llm.tokenizer.decode(prompt[-16:], skip_special=False) if llm.tokenizer else ""
            voices = [_Voice(k, llm.tokenizer, end) for k in range(params.n)]
            await self._relay(number, stream, voices)
            return {"finished": [voice.finished for voice in voices]}
        finally:
            self._streams.pop(number, None)

    async def _relay(self, number: int, stream: AsyncStream, voices: Sequence[_Voice]) -> None:
        last = 0.0
        async for delta in stream:
            voices[delta.sample].take(delta)
            early = _PIECE_SECONDS - (time.monotonic() - last)
            if early > 0 and delta.result is None:
                await asyncio.sleep(early)  # what comes meanwhile is handed out as one delta
            last = time.monotonic()
            self._send_pieces(number, voices)

    def _send_pieces(self, number: int, voices: Sequence[_Voice]) -> None:
        pieces = [piece for voice in voices if (piece := voice.piece()) is not None]
        if pieces:
            self.send({"id": number, "pieces": pieces})

    async def _count(self, message: Fields) -> dict[str, Any]:
        return await asyncio.to_thread(_counted, self._llm, list(message["messages"]))

    async def _tokens(self, message: Fields) -> int:
        tokenizer = self._llm.tokenizer
        if tokenizer is None:
            raise InvalidRequest("this model has no tokenizer")
        text = str(message["text"])
        return len(await asyncio.to_thread(tokenizer.encode, text, add_special=False))

    async def _kv_map(self, message: Fields) -> dict[str, Any]:
        return asdict(await asyncio.to_thread(self._llm.kv_map))

    async def _block_text(self, message: Fields) -> str:
        llm = self._llm
        ids = await asyncio.to_thread(llm.block_tokens, int(message["block"]))
        if not ids or llm.tokenizer is None:
            return ""
        return llm.tokenizer.decode(ids, skip_special=False)

    async def _load_adapter(self, message: Fields) -> str:
        return await asyncio.to_thread(self._llm.load_adapter, str(message["path"]))

    async def _unload_adapter(self, message: Fields) -> None:
        await asyncio.to_thread(self._llm.unload_adapter, str(message["name"]))

    async def _adapters(self, message: Fields) -> list[str]:
        return [name for name in self._llm.adapters if name not in self._weighted.values()]

    async def _adapter(self, name: str | None, weight: float) -> str | None:
        """The name of an adapter known by it, or in a folder of it, with so much of it added."""
        if name is None or weight == 0:
            return None
        llm = self._llm
        if name not in llm.adapters:
            name = await asyncio.to_thread(llm.load_adapter, name)
        if weight == 1.0:
            return name
        key = name, float(weight)
        if key not in self._weighted:
            folder = await asyncio.to_thread(llm.adapter_folder, name)
            assert folder is not None  # loaded above, or by load_adapter, from a folder
            self._weighted[key] = await asyncio.to_thread(
                lambda: llm.load_adapter(folder, f"{name} x {weight:g}", weight=weight)
            )
        return self._weighted[key]

    # ---- inside

    @property
    def _llm(self) -> LLM:
        if self._engine is None:
            raise EngineGone("no model is loaded", hint="choose one: /model")
        return self._engine.llm

    async def _watch(self, engine: AsyncEngine) -> None:
        """Sends on what goes on, in batches."""
        watch = engine.llm.watch(capacity=4096)
        told = 0
        try:
            while True:
                await asyncio.sleep(_EVENTS_SECONDS)
                events = [(type(event).__name__, _fields(event)) for event in watch.take()]
                if events:
                    self.send({"events": events, "dropped": watch.dropped - told})
                    told = watch.dropped
        finally:
            engine.llm.unwatch(watch)

    async def close(self) -> None:
        await self._close_engine()

    async def _close_engine(self) -> None:
        engine, self._engine = self._engine, None
        self._weighted.clear()
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        if engine is not None:
            await engine.close()


class _Voice:
    """One answer on its way: its text split from its thinking, its tokens described."""

    def __init__(self, index: int, tokenizer: Tokenizer | None, prompt_end: str) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._splitter = ThinkingSplitter(prompt_end)
        self._text = self._reasoning = ""
        self._tokens: list[dict[str, Any]] = []
        self.finished: dict[str, Any] | None = None

    def take(self, delta: GenerationDelta) -> None:
        self._add(self._splitter.feed(delta.text))
        logprobs = delta.logprobs or ()
        guesses = delta.guesses or (None,) * len(delta.token_ids)
        for at, (token, guess) in enumerate(zip(delta.token_ids, guesses, strict=True)):
            if guess is not None and guess != token:
                self._tokens.append(
                    {"id": guess, "text": self._spelled(guess), "drafted": "rejected"}
                )
            info: dict[str, Any] = {"id": token, "text": self._spelled(token)}
            if guess == token:
                info["drafted"] = "accepted"
            if at < len(logprobs):
                info["logprob"] = logprobs[at].logprob
                info["top"] = [(i, self._spelled(i), value) for i, value in logprobs[at].top]
            self._tokens.append(info)
        if delta.result is not None:
            self._add(self._splitter.finish())
            self.finished = _finished(delta.result)

    def piece(self) -> dict[str, Any] | None:
        """What came since the last one, None if nothing did."""
        if not (self._text or self._reasoning or self._tokens):
            return None
        piece = {
            "index": self._index,
            "text": self._text,
            "reasoning": self._reasoning,
            "tokens": self._tokens,
        }
        self._text, self._reasoning, self._tokens = "", "", []
        return piece

    def _add(self, parts: tuple[str, str]) -> None:
        self._text += parts[0]
        self._reasoning += parts[1]

    def _spelled(self, token: int) -> str:
        """Of a token that is no whole character, a mark stands for each of its bytes."""
        if self._tokenizer is None:
            return ""
        return self._tokenizer.token_bytes(token).decode(errors="replace")


def _finished(result: GenerationResult) -> dict[str, Any]:
    receipt = result.receipt.to_dict()
    return {"reason": result.finish_reason, "receipt": receipt, "seed": receipt["seed"]}


def _params(default: SamplingParams, message: Fields) -> SamplingParams:
    wishes = dict(message.get("params") or {})
    known = set(SamplingParams.__dataclass_fields__)
    unknown = sorted(set(wishes) - known)
    if unknown:
        raise InvalidRequest(f"there is no sampling parameter named {unknown[0]!r}")
    if int(message.get("n", 1)) > 1:
        wishes["n"] = int(message["n"])
    if int(message.get("logprobs", 0)) > 0:
        wishes["logprobs"] = int(message["logprobs"])
    wishes = {key: tuple(v) if isinstance(v, list) else v for key, v in wishes.items()}
    return replace(default, **wishes)


def _prompt(llm: LLM, message: Fields) -> list[int]:
    messages = list(message["messages"])
    tools = list(message.get("tools") or ()) or None
    if not message.get("continue_last"):
        return llm.chat_prompt(messages, tools)
    if not messages or messages[-1].get("role") != "assistant":
        raise InvalidRequest("only an answer of the assistant can be continued")
    start = llm.chat_prompt(messages[:-1], tools)
    assert llm.tokenizer is not None  # it has rendered the messages
    return [*start, *llm.tokenizer.encode(str(messages[-1]["content"]), add_special=False)]


def _counted(llm: LLM, messages: list[Any]) -> dict[str, Any]:
    """A message's own tokens are those that the prompt grows by."""
    ids = llm.chat_prompt(messages)
    own = [0] * len(messages)
    before = len(messages) - 1
    longer = len(ids)
    while before > 0 and before >= len(messages) - _COUNTED:
        try:
            shorter = len(llm.chat_prompt(messages[:before]))
        except LocalLLMError:  # some templates refuse to end there
            break
        own[before] = max(0, longer - shorter)
        longer, before = shorter, before - 1
    rest = messages[: before + 1]
    weights = [len(str(one.get("content", ""))) + 1 for one in rest]
    for at, weight in enumerate(weights):
        own[at] = longer * weight // sum(weights)
    return {
        "total": len(ids),
        "per_message": own,
        "cached": llm.cached_tokens(ids),
        "context": llm.info.context,
    }


def _fields(event: Any) -> dict[str, Any]:
    fields: dict[str, Any] = asdict(event)
    return fields


async def _serve() -> None:
    out = os.dup(sys.stdout.fileno())  # prints of any library go to stderr, not between the lines
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(out, view) :]

    server = Server(write)
    reader = asyncio.StreamReader(limit=MAX_LINE)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    server.tell({"phase": "starting"})
    tasks: set[asyncio.Task[None]] = set()
    try:
        await _read(reader, lambda message: _spawn(tasks, server.handle(message)))
    finally:
        with suppress(Exception):
            await asyncio.wait_for(server.close(), _CLOSE_SECONDS)


async def _read(reader: asyncio.StreamReader, handle: Callable[[Fields], None]) -> None:
    while True:
        try:
            data = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            return
        except asyncio.LimitOverrunError as error:
            await reader.readexactly(error.consumed)  # the rest of the line fails as JSON
            continue
        message = message_of(data)
        if message is None:
            print("a line that is no message was left out", file=sys.stderr)
        else:
            handle(message)


def _spawn(tasks: set[asyncio.Task[None]], work: Awaitable[None]) -> None:
    task = asyncio.ensure_future(work)
    assert isinstance(task, asyncio.Task)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def main() -> None:
    try:
        asyncio.run(_serve())
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    finally:
        sys.stdout.flush()
        # A step may be under way in a thread; nothing here needs to be saved.
        os._exit(0)
