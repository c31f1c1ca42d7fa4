"""Rounds of answers and calls: the model wants a call, it is made, the model is asked again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localllm.tui.engine.client import Asked, Engine, Finished, Json, Piece
from localllm.tui.tools.caller import Approve, Caller
from localllm.tui.tools.tool import MOST_RESULT, Call, Outcome, Tool


@dataclass(frozen=True)
class Turn:
    """The model has said its part of a round. message: of the conversation from now on."""

    content: str
    reasoning: str
    finished: Finished
    calls: tuple[Call, ...]

    @property
    def message(self) -> dict[str, Any]:
        told: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.calls:
            told["tool_calls"] = [call.message for call in self.calls]
        return told


@dataclass(frozen=True)
class Called:
    """A call that was made, or not. outcome: None while it is under way."""

    call: Call
    outcome: Outcome | None = None


Step = Piece | Turn | Called


class ToolLoop:
    """Asks an engine, with tools. Ends with a Turn without calls, or once `rounds` are over.

    approve: see `Caller`.
    """

    def __init__(
        self, engine: Engine, tools: Sequence[Tool], approve: Approve, *, rounds: int = 5
    ) -> None:
        self._engine = engine
        # As many characters as the context has tokens: about a third of it.
        model = engine.state.model
        most = MOST_RESULT if model is None else min(MOST_RESULT, model.context)
        self._caller = Caller(tools, self._unless_stopped, most)
        self._approve = approve
        self._rounds = rounds
        self._asked: Asked | None = None
        self._calling: asyncio.Future[Outcome] | None = None
        self._stopped = False

    def stop(self) -> None:
        """Ends the answer or the call under way, with what it has; no further call is made."""
        self._stopped = True
        if self._asked is not None:
            self._asked.stop()
        if self._calling is not None:
            self._calling.cancel()

    async def run(
        self, messages: Sequence[Json], params: Json, **options: Any
    ) -> AsyncIterator[Step]:
        """Pieces as they come; after each answer a Turn, then Called twice for each of its calls.

        options: of `Engine.ask`. The last round has no tools, so that an answer comes of it. Raises
        what asking raises.
        """
        told = [dict(message) for message in messages]
        schemas = self._caller.schemas
        for number in range(self._rounds + 1):
            last = number == self._rounds
            wish = {**params, "tool_choice": "none"} if last else params
            turn: Turn | None = None
            async for step in self._answer(told, wish, {**options, "tools": schemas}):
                if isinstance(step, Turn):
                    turn = step
                yield step
            assert turn is not None
            told.append(turn.message)
            for call in () if last else turn.calls:
                yield Called(call)
                outcome = await self._outcome(call)
                told.append(outcome.message)
                yield Called(call, outcome)
            if not turn.calls or self._stopped:
                return
            params = {key: value for key, value in params.items() if key != "tool_choice"}
            options.pop("continue_last", None)

    async def _answer(
        self, messages: Sequence[Json], params: Json, options: Mapping[str, Any]
    ) -> AsyncIterator[Piece | Turn]:
        asked = self._asked = self._engine.ask(messages, params, **options)
        if self._stopped:
            asked.stop()
        content = reasoning = ""
        async for piece in asked:
            content += piece.text
            reasoning += piece.reasoning
            yield piece
        finished = asked.result.get(0) or Finished("cancelled")
        calls = () if self._stopped else self._caller.calls(finished.tool_calls)
        yield Turn(content, reasoning, finished, calls)

    async def _outcome(self, call: Call) -> Outcome:
        stopped = Outcome(call, "failed", "The user stopped this before there was a result.")
        if self._stopped:
            return stopped
        self._calling = asyncio.ensure_future(self._caller.outcome(call))
        try:
            return await self._calling
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # not the call alone
                raise
            return stopped
        finally:
            self._calling = None

    async def _unless_stopped(self, call: Call) -> bool:
        return not self._stopped and await self._approve(call) and not self._stopped
