"""Rounds of answers and calls: the model wants a call, it is made, the model is asked again."""

from __future__ import annotations

import asyncio
import secrets
import string
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localllm.tui.engine.client import Asked, Engine, Finished, Json, Piece, ToolCall
from localllm.tui.tools.tool import Call, Outcome, Tool, ToolFailed, bounded, check_arguments

Approve = Callable[[Call], Awaitable[bool]]
_SECONDS = 120.0  # for a call; a server's own limit comes before
_REFUSED = "The user did not allow this call."
_ALPHABET = string.ascii_letters + string.digits


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

    approve: whether a call may be made; asked of every one whose tool is not harmless.
    """

    def __init__(
        self, engine: Engine, tools: Sequence[Tool], approve: Approve, *, rounds: int = 5
    ) -> None:
        self._engine = engine
        self._tools = {tool.called: tool for tool in tools}
        self._approve = approve
        self._rounds = rounds
        self._asked: Asked | None = None
        self._stopped = False

    def stop(self) -> None:
        """Ends the answer under way, with what it has; no further call is made."""
        self._stopped = True
        if self._asked is not None:
            self._asked.stop()

    async def run(
        self, messages: Sequence[Json], params: Json, **options: Any
    ) -> AsyncIterator[Step]:
        """Pieces as they come; after each answer a Turn, then Called twice for each of its calls.

        options: of `Engine.ask`. The last round has no tools, so that an answer comes of it. Raises
        what asking raises.
        """
        told = [dict(message) for message in messages]
        schemas = [tool.schema for tool in self._tools.values()]
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
        calls = () if self._stopped else tuple(map(self._call_of, finished.tool_calls))
        yield Turn(content, reasoning, finished, calls)

    def _call_of(self, told: ToolCall) -> Call:
        # Nine letters and digits are what the strictest template (Mistral's) takes.
        number = "".join(secrets.choice(_ALPHABET) for _ in range(9))
        if told.arguments is None:
            return Call(number, told.name or "unknown", {"unreadable": told.raw[:2000]})
        return Call(number, told.name, told.arguments, self._tools.get(told.name))

    async def _outcome(self, call: Call) -> Outcome:
        tool = call.tool
        if tool is None:
            if "unreadable" in call.arguments:
                why = "The call could not be read: it must be JSON with a name and arguments."
            else:
                known = ", ".join(self._tools) or "none"
                why = f"There is no function {call.name!r}; there are: {known}."
            return Outcome(call, "failed", why)
        try:
            check_arguments(call.arguments, tool.parameters)
            if self._stopped or not (tool.harmless or await self._approve(call)):
                return Outcome(call, "refused", _REFUSED)
            async with asyncio.timeout(_SECONDS):
                return Outcome(call, "done", bounded(await tool.call(call.arguments)))
        except ToolFailed as error:
            return Outcome(call, "failed", bounded(f"Error: {error}"))
        except TimeoutError:
            return Outcome(call, "failed", f"Error: no result within {_SECONDS:g} seconds")
        except Exception as error:  # a tool's own fault is no reason to end the answer
            return Outcome(call, "failed", f"Error: {type(error).__name__}: {error}"[:500])
