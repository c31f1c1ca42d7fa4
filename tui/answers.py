"""Answers under way: asking the engine, keeping what arrives, what waits for its turn."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from localllm.errors import InvalidRequest, LocalLLMError, StoreError
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
_MOST_AT_ONCE = 64  # answers, as the sampling parameters have it
_TRY_AGAIN = 2.0  # seconds until an answer that could not be written is tried again
TITLE_WIDTH = 48
NEW_CHATS = "params"  # setting: the sampling of chats to come


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
    continuation included. first: when its first piece came. tokens: of this run. others: where
    several answers are given at once, those beside the first, each a sibling of it."""

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
    others: list[Live] = field(default_factory=list)
    listeners: list[Callable[[str, str], None]] = field(default_factory=list)
    ended: list[Callable[[], None]] = field(default_factory=list)

    @property
    def all(self) -> tuple[Live, ...]:
        """Itself and the others, in the order of the engine's indices."""
        return self, *self.others

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

        Where the chat's `n` asks for several, the others are its siblings. params: beside the
        chat's own, for this answer; only: in their place. Raises InvalidRequest where one is under
        way in this chat.
        """
        self._refuse_second(chat)
        with self._app.store.together():
            live, settings = self._begin(chat, parent, params or {}, only)
        self._start(live, settings, continued=False)
        return self._app.store.message(live.message)

    def say(self, chat: int, said: Said, waiting: list[Said] | None = None) -> None:
        """What a person says at the end of the open branch, and the answer to it; all of it is in
        the store then, or, with a StoreError, nothing. waiting: what stays in the queue."""
        self._refuse_second(chat)
        store = self._app.store
        with store.together():
            found = store.chat(chat)
            message = store.add_message(chat, found.head, "user", said.content, extra=said.extra)
            store.edit_chat(chat, draft="", title=found.title or one_line(said.typed, TITLE_WIDTH))
            if waiting is not None:
                self.set_queue(chat, waiting)
            live, settings = self._begin(chat, message.id, {}, False)
        self._start(live, settings, continued=False)

    def _begin(
        self, chat: int, parent: int | None, params: Mapping[str, Any], only: bool
    ) -> tuple[Live, dict[str, Any]]:
        """The messages that will be written, and with which sampling."""
        store = self._app.store
        found = store.chat(chat)
        settings = {**({} if only else self.params(found)), **params}
        lives = []
        for number in range(how_many(settings)):
            message = store.add_message(
                chat,
                parent,
                "assistant",
                "",
                status="writing",
                model=found.model or self.opened,
                adapter=found.adapter,
                params=of_one(settings),
                extra={"sample": number} if settings.get("beams") else None,
                open_branch=number == 0,
            )
            lives.append(Live(message.id, chat))
        first, *first.others = lives
        return first, settings

    def go_on(self, message: Message) -> None:
        """Continues an answer where its text ends, in its place."""
        self._refuse_second(message.chat)
        store = self._app.store
        store.edit_message(message.id, status="writing")
        settings = {**self.params(store.chat(message.chat)), **message.params}
        for name in ("seed", "n", "best_of", "beams"):  # it is one answer, and goes on as one
            settings.pop(name, None)
        live = Live(message.id, message.chat, text=message.content, reasoning=message.reasoning)
        self._start(live, settings, continued=bool(message.content))

    def offered(self) -> list[Mapping[str, Any]]:
        """The tools that the model is told of, as JSON schemas."""
        tools = self._app.tools.on() if self._app.tools is not None else ()
        return [tool.schema for tool in tools]

    def writing(self, chat: int, message: int) -> Live | None:
        """What is known of a message that is being written; None of any other."""
        live = self.live.get(chat)
        every = () if live is None else live.all
        return next((one for one in every if one.message == message), None)

    def params(self, chat: Chat) -> dict[str, Any]:
        """The sampling that holds in a chat, beside what the model's makers recommend."""
        return {**self._set, **chat.params}

    def usual(self) -> dict[str, Any]:
        """What holds where a chat sets nothing."""
        model = self._app.engine.state.model
        return {**({} if model is None else model.sampling), **self._set}

    def of_new_chat(self) -> dict[str, Any]:
        """The sampling that a chat begins with. What the app was begun with goes before."""
        kept = self._app.store.setting(NEW_CHATS, {})
        return {name: value for name, value in kept.items() if name not in self._app.opening.params}

    @property
    def _set(self) -> dict[str, Any]:
        return {"max_tokens": self._app.settings.max_tokens, **self._app.opening.params}

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
            if tools and live.others:
                raise InvalidRequest(
                    f"{len(live.all)} answers at once cannot call tools",
                    hint="set n to 1 (/parameters), or turn the tools off (/tools)",
                )
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

    def _take(self, first: Live, piece: Piece) -> None:
        live = first.all[piece.index]
        live.last = time.monotonic()
        if live.first is None:
            live.first = live.last
        live.tokens += sum(token.drafted != "rejected" for token in piece.tokens)
        live.seen += piece.tokens[: MOST_TOKENS - len(live.seen)]
        live.text += piece.text
        live.reasoning += piece.reasoning
        for listener in list(live.listeners):
            listener(piece.text, piece.reasoning)

    async def _keep_writing(self, first: Live) -> None:
        kept = {live.message: (live.text, live.reasoning) for live in first.all}
        while True:
            await asyncio.sleep(KEEP_EVERY)
            for live in first.all:
                now = live.text, live.reasoning
                if now != kept.get(live.message, ("", "")):
                    with contextlib.suppress(StoreError):  # tried again soon; the end tells of it
                        self._app.store.edit_message(
                            live.message, content=live.text, reasoning=live.reasoning
                        )
                        kept[live.message] = now

    async def _end(
        self,
        first: Live,
        status: str,
        error: LocalLLMError | None,
        result: Mapping[int, Finished] | None,
        params: dict[str, Any],
    ) -> None:
        for index, live in enumerate(first.all):
            finished = (result or {}).get(index)
            await self._written(partial(self._keep, live, status, error, finished, params))
        del self.live[first.chat]
        self._tasks.pop(first.chat, None)
        for live in first.all:
            for listener in live.ended:
                listener()
        if error is not None and self._app.engine.state.phase != "dead":  # the banner tells that
            self._app.tell(error)
        self._app.chat_screen.answer_ended(first, failed=error is not None)
        if error is None:
            if status == "complete" and self._app.settings.titles:
                self._spawn(self._title(first.chat))
            try:
                self._next(first.chat)
            except LocalLLMError as problem:  # it waits on
                self._app.tell(problem)

    async def _written(self, write: Callable[[], None]) -> None:
        """Until it is: an answer that does not fit on a full disk stays under way."""
        told = False
        while True:
            try:
                return write()
            except StoreError as error:
                if not told:
                    self._app.tell(error)
                told = True
            await asyncio.sleep(_TRY_AGAIN)

    def _keep(
        self,
        live: Live,
        status: str,
        error: LocalLLMError | None,
        finished: Finished | None,
        params: dict[str, Any],
    ) -> None:
        """The answer as it ended, in the store; an empty one goes."""
        store = self._app.store
        fields: dict[str, Any] = {"content": live.text, "reasoning": live.reasoning}
        fields["status"] = status
        extra: dict[str, Any] = {}
        if finished is not None:
            fields["receipt"] = {**finished.receipt, "stopped_by": finished.reason}
            if finished.seed is not None:
                fields["params"] = {**of_one(params), "seed": finished.seed}
            if finished.tool_calls:
                extra["tool_calls"] = [asdict(call) for call in finished.tool_calls]
        if error is not None:
            extra["error"] = str(error)
        with contextlib.suppress(KeyError):  # the chat may be gone by now
            before = store.message(live.message)
            if not live.text and not live.reasoning and status != "complete":
                store.prune(live.message)
            else:
                if extra:
                    fields["extra"] = {**before.extra, **extra}
                store.edit_message(live.message, **fields)
        keep_tokens(self._app, live.message, token_views(live.seen))

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
            self._app.chat_screen.say_in(chat, waiting[0], waiting[1:])

    # ---- titles

    async def _title(self, chat: int) -> None:
        """The model names a chat after its first answer; anything wrong leaves it as it was."""
        store = self._app.store
        try:
            found = store.chat(chat)
        except KeyError:
            return
        branch = store.branch(found.head)
        questions = [message for message in branch if message.role == "user"]
        answer = branch[-1] if branch else None
        if found.titled or len(questions) != 1 or answer is None or answer.role != "assistant":
            return
        from localllm.tui.titles import make_title

        with contextlib.suppress(LocalLLMError):
            title = await make_title(self._app.engine, questions[0].content, answer.content)
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


def how_many(params: Mapping[str, Any]) -> int:
    """Answers that are asked for at once. What is no such number the engine refuses."""
    n = params.get("n")
    return n if isinstance(n, int) and 1 < n <= _MOST_AT_ONCE else 1


def of_one(params: Mapping[str, Any]) -> dict[str, Any]:
    """What makes one of several answers again, given its seed: they are drawn as if each had been
    asked for alone. Beams are not drawn, so that all of them are needed for one."""
    left_out = () if params.get("beams") else ("n", "best_of")
    return {name: value for name, value in params.items() if name not in left_out}
