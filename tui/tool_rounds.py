"""An answer with tools: every part of every round is a message of the tree as soon as it is there.

The model's part with its calls, each call's result, the model's next part: each follows the one
before, so that a round can be looked into, branched from and searched like anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from localllm.tui.engine.client import Finished, Piece
from localllm.tui.store import Message
from localllm.tui.tokens import keep_tokens, token_views
from localllm.tui.tool_settings import approve
from localllm.tui.tools.loop import Called, ToolLoop, Turn
from localllm.tui.tools.tool import Call, Tool

if TYPE_CHECKING:
    from localllm.tui.answers import Live
    from localllm.tui.app import ChatApp


async def answer_with_tools(
    app: ChatApp,
    live: Live,
    tools: Sequence[Tool],
    messages: Sequence[Mapping[str, Any]],
    params: Mapping[str, Any],
    options: Mapping[str, Any],
    take: Callable[[Live, Piece], None],
) -> dict[int, Finished]:
    """Answers, round by round; `live` moves on to the next message of the tree with each.

    options: of Engine.ask. take: what becomes of a piece. The result is the last part's.
    """
    writer = _Writer(app, live, params)

    async def allowed(call: Call) -> bool:
        tool = call.tool
        assert tool is not None
        return await approve(
            app,
            app.store,
            live.chat,
            tool.name,
            call.arguments,
            source=tool.source,
            description=tool.description,
        )

    assert app.tools is not None
    loop = ToolLoop(app.engine, tools, allowed, rounds=app.tools.rounds)
    live.asked = loop
    if live.stopped:
        loop.stop()
    finished = Finished("cancelled")
    try:
        async for step in loop.run(messages, params, **options):
            if isinstance(step, Piece):
                await writer.next_part()
                take(live, step)
            elif isinstance(step, Turn):
                await writer.next_part()
                finished = step.finished
                if step.calls:
                    writer.end_part(step)
            elif isinstance(step, Called):
                await writer.called(step)
    except BaseException:
        writer.leave()
        raise
    if live.stopped:
        writer.leave()
    return {0: finished}


class _Writer:
    """Puts the rounds into the store, and on the screen where their chat is open."""

    def __init__(self, app: ChatApp, live: Live, params: Mapping[str, Any]) -> None:
        self._app, self._live, self._params = app, live, dict(params)
        self._last = live.message  # what the next message follows
        self._ended = False  # whether the model's part is done, and calls follow
        self._under_way: Message | None = None  # the call's message

    def end_part(self, turn: Turn) -> None:
        """The model has said its part of a round, with calls."""
        live, store = self._live, self._app.store
        receipt = {**turn.finished.receipt, "stopped_by": turn.finished.reason}
        store.edit_message(
            live.message,
            content=live.text,
            reasoning=live.reasoning,
            status="complete",
            receipt=receipt,
            extra={"tool_calls": [call.message for call in turn.calls]},
        )
        keep_tokens(self._app, live.message, token_views(live.seen))
        for listener in live.ended:
            listener()
        self._ended = True

    async def called(self, step: Called) -> None:
        """A call is made, or has been."""
        store, call, outcome = self._app.store, step.call, step.outcome
        extra = {"tool_call_id": call.id, "name": call.name, "arguments": dict(call.arguments)}
        if call.tool is not None:
            extra["tool"] = call.tool.name  # as the user knows it
        if outcome is None:
            self._under_way = store.add_message(
                self._live.chat,
                self._last,
                "tool",
                "",
                status="writing",
                extra={**extra, "state": "running"},
            )
            self._last = self._under_way.id
        else:
            assert self._under_way is not None
            store.edit_message(
                self._under_way.id,
                content=outcome.text,
                status="complete",
                extra={**extra, "state": outcome.state},
            )
        await self._show()

    async def next_part(self) -> None:
        """Begins the model's next message where calls were made."""
        if self.begin_part():
            await self._show()

    def begin_part(self) -> bool:
        """The same in the store alone. False where no calls were made."""
        if not self._ended:
            return False
        live, store = self._live, self._app.store
        before = store.message(live.message)
        made = store.add_message(
            live.chat,
            self._last,
            "assistant",
            "",
            status="writing",
            model=before.model,
            adapter=before.adapter,
            params=self._params,
        )
        live.message = self._last = made.id
        live.text = live.reasoning = ""
        live.first = live.last = None
        live.tokens = 0
        live.seen = []
        live.listeners.clear()
        live.ended.clear()
        self._ended = False
        return True

    def leave(self) -> None:
        """What ends the answer after calls ends a part of its own: they and their results stay."""
        with suppress(KeyError):  # the chat may be gone by now
            self.begin_part()

    async def _show(self) -> None:
        if self._app.chat_id == self._live.chat:
            await self._app.chat_screen.load()
