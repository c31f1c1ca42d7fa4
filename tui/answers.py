"""Answers under way: asking the engine, keeping what arrives, what waits for its turn."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from localllm.errors import InvalidRequest, LocalLLMError
from localllm.tui.conversation import asked
from localllm.tui.engine.client import EngineGone
from localllm.tui.store import Chat, Message
from localllm.tui.text import one_line
from localllm.tui.tokens import MOST_TOKENS, keep_tokens, token_views

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp
    from localllm.tui.engine.client import Finished, Piece, TokenInfo

KEEP_EVERY = 0.5  # seconds between two writes of an answer under way: all that a kill can cost
_MOST_QUEUED = 50
TITLE_WIDTH = 48


@dataclass(frozen=True)
class Said:
    """What a person says. content: with the files that go along. extra: for the store."""

    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def typed(self) -> str:
        return typed_of(self.content, self.extra)


def typed_of(content: str, extra: Mapping[str, Any]) -> str:
    """The person's own words in a message, without the files after them."""
    typed = extra.get("typed")
    return content[:typed] if isinstance(typed, int) else content


class Stoppable(Protocol):
    def stop(self) -> None: ...


@dataclass
class Live:
    """An answer under way. text, reasoning: what the message holds so far, the part before a
    continuation included. first: when its first piece came. tokens: of this run."""

    message: int
    chat: int
    text: str = ""
    reasoning: str = ""
    waiting: bool = True  # for the engine to be ready
    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    stopped: bool = False
    asked: Stoppable | None = None
    seen: list[TokenInfo] = field(default_factory=list)
    listeners: list[Callable[[str, str], None]] = field(default_factory=list)
    ended: list[Callable[[], None]] = field(default_factory=list)

    @property
    def speed(self) -> float | None:
        """Tokens a second since the first piece."""
        if self.first is None or self.last is None or self.last <= self.first or self.tokens < 2:
            return None
        return (self.tokens - 1) / (self.last - self.first)


class Answers:
    """What the chats' answers need of the engine and the store.

    live: the answer under way of each chat. queued: what its user has said meanwhile.
    """

    def __init__(self, app: ChatApp) -> None:
        self._app = app
        self.live: dict[int, Live] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._others: set[asyncio.Task[None]] = set()
        self._opening = asyncio.Lock()
        self.opened: str | None = None  # the model that the engine was last asked for

    # ---- the engine

    def open_engine(self, model: str, options: Mapping[str, Any]) -> None:
        """Begins to load the model; what went wrong is in the engine's state."""
        self.opened = model
        self._spawn(self._open(model, options))

    async def _open(self, model: str, options: Mapping[str, Any]) -> None:
        async with self._opening:
            with contextlib.suppress(LocalLLMError):  # the engine's state tells it
                await self._app.engine.open(model, **options)

    async def restart_engine(self) -> None:
        """After its end. Raises what restarting raises."""
        async with self._opening:
            await self._app.engine.restart()

    async def _ready(self, chat: Chat) -> None:
        """Returns when the chat's model can be asked. Raises EngineGone."""
        wanted = chat.model
        if wanted and wanted != self.opened:
            self.opened = wanted
            await self._open(wanted, self._app.opening.options)
        engine = self._app.engine
        if engine.state.phase not in ("ready", "dead"):
            changed = asyncio.Event()
            leave = engine.subscribe(lambda news: changed.set())
            try:
                while engine.state.phase not in ("ready", "dead"):
                    changed.clear()
                    await changed.wait()
            finally:
                leave()
        if engine.state.phase == "dead":
            error = engine.state.error or "the engine has ended"
            raise EngineGone(error, hint=engine.state.hint or "/restart starts it again")

    # ---- asking

    def ask(
        self,
        chat: int,
        parent: int | None,
        *,
        params: Mapping[str, Any] | None = None,
        only: bool = False,
    ) -> Message:
        """A new answer that follows `parent`; the open branch then ends with it.

        params: beside the chat's own, for this answer; only: in their place. Raises InvalidRequest
        where one is under way in this chat.
        """
        self._refuse_second(chat)
        store = self._app.store
        found = store.chat(chat)
        settings = {**({} if only else self.params(found)), **(params or {})}
        message = store.add_message(
            chat,
            parent,
            "assistant",
            "",
            status="writing",
            model=found.model or self.opened,
            adapter=found.adapter,
            params=settings,
        )
        self._start(Live(message.id, chat), settings, continued=False)
        return message

    def go_on(self, message: Message) -> None:
        """Continues an answer where its text ends, in its place."""
        self._refuse_second(message.chat)
        store = self._app.store
        store.edit_message(message.id, status="writing")
        settings = {**self.params(store.chat(message.chat)), **message.params}
        settings.pop("seed", None)
        live = Live(message.id, message.chat, text=message.content, reasoning=message.reasoning)
        self._start(live, settings, continued=bool(message.content))

    def params(self, chat: Chat) -> dict[str, Any]:
        """The sampling that holds in a chat."""
        return {
            "max_tokens": self._app.settings.max_tokens,
            **self._app.opening.params,
            **chat.params,
        }

    def stop(self, chat: int) -> bool:
        """Ends the chat's answer, which keeps its part. False where none is under way."""
        live = self.live.get(chat)
        if live is None:
            return False
        live.stopped = True
        if live.asked is not None:
            live.asked.stop()
        elif task := self._tasks.get(chat):
            task.cancel()
        return True

    def _refuse_second(self, chat: int) -> None:
        if chat in self.live:
            raise InvalidRequest("an answer is under way in this chat", hint="Esc stops it")

    def _start(self, live: Live, params: dict[str, Any], *, continued: bool) -> None:
        self.live[live.chat] = live
        task = asyncio.create_task(
            self._run(live, params, continued), name=f"answer {live.message}"
        )
        self._tasks[live.chat] = task

    async def _run(self, live: Live, params: dict[str, Any], continued: bool) -> None:
        store = self._app.store
        status, error = "complete", None
        result: Mapping[int, Finished] | None = None
        keeper = asyncio.create_task(self._keep_writing(live))
        try:
            chat = store.chat(live.chat)
            await self._ready(chat)
            live.waiting = False
            branch = store.branch(live.message)
            if not continued:
                branch.pop()
            adapter = chat.adapter and await self._app.engine.load_adapter(chat.adapter)
            messages = asked(chat, branch)
            options: dict[str, Any] = {
                "adapter": adapter,
                "adapter_weight": chat.adapter_weight,
                "continue_last": continued,
            }
            tools = self._app.tools.on() if self._app.tools is not None else ()
            if tools:
                from localllm.tui.tool_rounds import answer_with_tools

                result = await answer_with_tools(
                    self._app, live, tools, messages, params, options, self._take
                )
            else:
                under_way = live.asked = self._app.engine.ask(messages, params, **options)
                if live.stopped:
                    under_way.stop()
                async for piece in under_way:
                    self._take(live, piece)
                result = under_way.result
        except asyncio.CancelledError:
            live.stopped = True
        except LocalLLMError as problem:
            status, error = "failed", problem
        finally:
            keeper.cancel()
        if live.stopped and error is None:
            status = "stopped"
        await self._end(live, status, error, result, params)

    def _take(self, live: Live, piece: Piece) -> None:
        live.last = time.monotonic()
        if live.first is None:
            live.first = live.last
        live.tokens += sum(token.drafted != "rejected" for token in piece.tokens)
        live.seen += piece.tokens[: MOST_TOKENS - len(live.seen)]
        live.text += piece.text
        live.reasoning += piece.reasoning
        for listener in list(live.listeners):
            listener(piece.text, piece.reasoning)

    async def _keep_writing(self, live: Live) -> None:
        kept = (live.text, live.reasoning)
        while True:
            await asyncio.sleep(KEEP_EVERY)
            if (live.text, live.reasoning) != kept:
                kept = (live.text, live.reasoning)
                self._app.store.edit_message(
                    live.message, content=live.text, reasoning=live.reasoning
                )

    async def _end(
        self,
        live: Live,
        status: str,
        error: LocalLLMError | None,
        result: Any,
        params: dict[str, Any],
    ) -> None:
        store = self._app.store
        fields: dict[str, Any] = {"content": live.text, "reasoning": live.reasoning}
        fields["status"] = status
        finished = _first(result)
        if finished is not None:
            fields["receipt"] = {**finished.receipt, "stopped_by": finished.reason}
            if finished.seed is not None:
                fields["params"] = {**params, "seed": finished.seed}
            if finished.tool_calls:
                fields["extra"] = {"tool_calls": [asdict(call) for call in finished.tool_calls]}
        if error is not None:
            fields["extra"] = {"error": str(error)}
        with contextlib.suppress(KeyError):  # the chat may be gone by now
            if store.message(live.message) is not None:
                if not live.text and not live.reasoning and status != "complete":
                    store.prune(live.message)
                else:
                    store.edit_message(live.message, **fields)
        keep_tokens(self._app, live.message, token_views(live.seen))
        del self.live[live.chat]
        self._tasks.pop(live.chat, None)
        for listener in live.ended:
            listener()
        if error is not None and not isinstance(error, EngineGone):
            self._app.tell(error)
        self._app.chat_screen.answer_ended(live, failed=error is not None)
        if error is None:
            if status == "complete" and self._app.settings.titles:
                self._spawn(self._title(live.chat))
            self._next(live.chat)

    # ---- what waits

    def queued(self, chat: int) -> list[Said]:
        found = self._app.store.setting(f"queue:{chat}", [])
        return [Said(str(content), dict(extra)) for content, extra in found]

    def set_queue(self, chat: int, waiting: list[Said]) -> None:
        if len(waiting) > _MOST_QUEUED:
            raise InvalidRequest(f"{_MOST_QUEUED} messages wait already; let some be answered")
        kept = [[said.content, dict(said.extra)] for said in waiting]
        self._app.store.set_setting(f"queue:{chat}", kept)

    def _next(self, chat: int) -> None:
        waiting = self.queued(chat)
        if waiting:
            self.set_queue(chat, waiting[1:])
            self._app.chat_screen.say_in(chat, waiting[0])

    # ---- titles

    async def _title(self, chat: int) -> None:
        """The model names a chat after its first answer; anything wrong leaves it as it was."""
        store = self._app.store
        try:
            found = store.chat(chat)
        except KeyError:
            return
        branch = store.branch(found.head)
        if found.titled or len(branch) != 2:
            return
        from localllm.tui.titles import make_title

        with contextlib.suppress(LocalLLMError):
            title = await make_title(self._app.engine, branch[0].content, branch[1].content)
            with contextlib.suppress(KeyError):
                if title and not store.chat(chat).titled:
                    store.edit_chat(chat, title=one_line(title, TITLE_WIDTH), titled=2)
                    self._app.chat_screen.chats_changed()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)

    async def close(self) -> None:
        """Stops every answer; their parts are kept."""
        tasks = list(self._tasks.values())
        for task in self._others:
            task.cancel()
        for chat in list(self.live):
            self.stop(chat)
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=1)
            for task in pending:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _first(result: Any) -> Any:
    """Of a result per index (a mapping or a sequence) the first, None where nothing ended."""
    if isinstance(result, Mapping):
        return result.get(0)
    if isinstance(result, list | tuple):
        return result[0] if result else None
    return result
