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
from typing import Any

from localllm.async_engine import AsyncEngine
from localllm.async_stream import AsyncStream
from localllm.engine.events import Ended, StepDone
from localllm.errors import InvalidRequest
from localllm.hub import resolve
from localllm.llm import LLM
from localllm.tui.engine.adapters import Adapters
from localllm.tui.engine.asking import Voice, as_delta, asking, counted, recommended
from localllm.tui.engine.client import EngineGone
from localllm.tui.engine.cores import SERVER, Cores
from localllm.tui.engine.wire import MAX_LINE, error_fields, line, message_of

_PIECE_SECONDS = 1 / 12  # an answer is drawn no more often, so pieces need not come sooner
_EVENTS_SECONDS = 0.2
_PROGRESS_SECONDS = 0.1
_CLOSE_SECONDS = 0.8  # for what a KV disk still has to write
_MAX_ASKED = 64  # answers under way

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
    def __init__(self, write: Callable[[bytes], None], cores: Cores) -> None:
        self._write_raw = write
        self._cores = cores
        self._lock = threading.Lock()
        self._engine: AsyncEngine | None = None
        self._adapters: Adapters | None = None
        self._asked: dict[int, AsyncStream | None] = {}  # None: its prompt is being made
        self._stopped: set[int] = set()
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
            "adapters": self._list_adapters,
        }.get(str(do))
        if do == "stop":
            self._stop(int(message.get("ask", -1)))
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
        """The model before it is let go once the new one's files are here, so that a wrong name
        or a broken network costs nothing."""
        async with self._opening:
            name = str(message["model"])
            options = dict(message.get("options") or {})
            self.tell({"phase": "loading", "detail": name})
            progress = Progress(self.tell)
            try:
                await asyncio.to_thread(
                    resolve, name, progress=progress, offline=options.get("offline")
                )
            except Exception as error:
                self._tell_failure(error)
                raise
            await self._close_engine()
            try:
                engine = AsyncEngine(name, max_waiting=_MAX_ASKED, progress=progress, **options)
                await engine.start()
            except Exception as error:
                self._tell_failure(error)
                raise
            self._engine = engine
            self._adapters = Adapters(engine.llm)
            self._watching = asyncio.create_task(self._watch(engine))
            self._tell_ready(engine.llm)

    def _tell_failure(self, error: Exception) -> None:
        if self._engine is not None:
            self._tell_ready(self._engine.llm)
            return
        fields = error_fields(error)
        self.tell({"phase": "dead", "error": fields["message"], "hint": fields["hint"]})

    def _tell_ready(self, llm: LLM) -> None:
        info = llm.info
        notes = [info.load_note]
        if info.backend_note:
            notes.insert(0, f"runs on {info.backend}: {info.backend_note}")
        model = {
            "name": info.name,
            "backend": info.backend,
            "context": info.context,
            "vocabulary": llm.spec.vocab_size,
            "format": info.format,
            "path": info.path,
            "note": "; ".join(note for note in notes if note),
            "sampling": recommended(llm.default_params),
        }
        self.tell({"phase": "ready", "model": model})

    async def _ask(self, message: Fields) -> dict[str, Any]:
        """Pieces go out under the request's id; its answer is how each of them ended."""
        number, llm = int(message["id"]), self._llm
        if len(self._asked) >= _MAX_ASKED:
            raise InvalidRequest(f"{_MAX_ASKED} answers are under way already")
        self._asked[number] = None
        self._cores.computing = True
        try:
            return await self._answer(number, llm, message)
        finally:
            del self._asked[number]
            self._cores.computing = bool(self._asked)
            self._stopped.discard(number)

    async def _answer(self, number: int, llm: LLM, message: Fields) -> dict[str, Any]:
        assert self._engine is not None
        assert self._adapters is not None
        named, weight = message.get("adapter"), float(message.get("adapter_weight", 1.0))
        adapter = await asyncio.to_thread(self._adapters.with_weight, named, weight)
        wanted = await asyncio.to_thread(asking, llm, message)
        stream = self._engine.generate(
            wanted.prompt,
            wanted.params,
            detokenizer=wanted.detokenizer(),
            adapter=adapter,
        )
        self._asked[number] = stream
        if number in self._stopped:  # while its prompt was made
            stream.cancel()
        voices = wanted.voices()
        if wanted.params.samples > wanted.params.n:  # which ones are given is known at the end
            best = await stream.whole()
            for sample, result in enumerate((best, *best.alternatives)):
                voices[sample].take(as_delta(result, sample))
        async for delta in stream:
            voices[delta.sample].take(delta)
            if not stream.news:
                self._send_pieces(number, voices)
                await asyncio.sleep(_PIECE_SECONDS)  # what comes meanwhile is handed out as one
        self._send_pieces(number, voices)
        return {"finished": [voice.finished for voice in voices]}

    def _stop(self, number: int) -> None:
        if number in self._asked:
            self._stopped.add(number)
            if (stream := self._asked[number]) is not None:
                stream.cancel()

    def _send_pieces(self, number: int, voices: Sequence[Voice]) -> None:
        pieces = [piece for voice in voices if (piece := voice.piece()) is not None]
        if pieces:
            self.send({"id": number, "pieces": pieces})

    async def _count(self, message: Fields) -> dict[str, Any]:
        messages, tools = list(message["messages"]), list(message.get("tools") or ())
        return await asyncio.to_thread(counted, self._llm, messages, tools)

    async def _tokens(self, message: Fields) -> int:
        tokenizer = self._llm.tokenizer
        if tokenizer is None:
            raise InvalidRequest("this model has no tokenizer")
        text = str(message["text"])
        return len(await asyncio.to_thread(tokenizer.encode, text, add_special=False))

    async def _kv_map(self, message: Fields) -> dict[str, Any]:
        """Free blocks are left out: there may be many, and nothing is to be told of them."""
        found = await asyncio.to_thread(self._llm.kv_map)
        told = [
            (block.number, block.refcount, block.owners, block.name)
            for block in found.blocks
            if block.refcount or block.name
        ]
        groups = [0] * (1 + max((block.group for block in found.blocks), default=0))
        for block in found.blocks:
            groups[block.group] += 1
        return {"groups": groups, "block_size": found.block_size, "blocks": told}

    async def _block_text(self, message: Fields) -> str:
        llm = self._llm
        ids = await asyncio.to_thread(llm.block_tokens, int(message["block"]))
        if not ids or llm.tokenizer is None:
            return ""
        return llm.tokenizer.decode(ids, skip_special=False)

    async def _load_adapter(self, message: Fields) -> str:
        return await asyncio.to_thread(self._known_adapters.load, str(message["path"]))

    async def _unload_adapter(self, message: Fields) -> None:
        await asyncio.to_thread(self._known_adapters.unload, str(message["name"]))

    async def _list_adapters(self, message: Fields) -> list[str]:
        return self._known_adapters.names

    # ---- inside

    @property
    def _llm(self) -> LLM:
        if self._engine is None:
            raise EngineGone("no model is loaded", hint="choose one: /model")
        return self._engine.llm

    @property
    def _known_adapters(self) -> Adapters:
        assert self._llm is not None  # raises if no model is loaded
        assert self._adapters is not None
        return self._adapters

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
        self._adapters = None
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        if engine is not None:
            await engine.close()


def _fields(event: Any) -> dict[str, Any]:
    """As `dataclasses.asdict`, which is too slow for something that happens at every step."""
    told = dict(vars(event))
    if isinstance(event, StepDone):
        told["batch"] = [vars(row) for row in event.batch]
    elif isinstance(event, Ended):
        told["receipt"] = event.receipt.to_dict()
    return told


async def _serve(cores: Cores) -> None:
    out = os.dup(sys.stdout.fileno())  # prints of any library go to stderr, not between the lines
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(out, view) :]

    server = Server(write, cores)
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


def main(cores: Cores) -> None:
    """Speaks with the app that `cores` are shared with."""
    cores.lend()
    cores.computing = False  # whatever the one before it was at
    try:
        cores.run(_serve(cores), SERVER)
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    finally:
        sys.stdout.flush()
        # A step may be under way in a thread; nothing here needs to be saved.
        os._exit(0)
