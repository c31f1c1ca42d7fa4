"""Makes the calls that a model asks for, one by one, if they may be made."""

from __future__ import annotations

import asyncio
import secrets
import string
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from localllm.tui.engine.client import ToolCall
from localllm.tui.tools.tool import (
    MOST_RESULT,
    Call,
    Outcome,
    Tool,
    ToolFailed,
    bounded,
    check_arguments,
)

Approve = Callable[[Call], Awaitable[bool]]
_SECONDS = 120.0  # for a call; a server's own limit comes before
_REFUSED = "The user did not allow this call."
_ALPHABET = string.ascii_letters + string.digits


class Caller:
    """approve: whether a call may be made; asked of every one whose tool is not harmless. most:
    characters of a result that are told."""

    def __init__(self, tools: Sequence[Tool], approve: Approve, most: int = MOST_RESULT) -> None:
        self._tools = {tool.called: tool for tool in tools}
        self._approve = approve
        self._most = most

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """What the model is offered, for `Engine.ask`."""
        return [tool.schema for tool in self._tools.values()]

    def calls(self, told: Iterable[ToolCall]) -> tuple[Call, ...]:
        """What the engine read in an answer, with numbers and the tools that are meant."""
        return tuple(map(self._call, told))

    async def outcome(self, call: Call) -> Outcome:
        """Asks whether it may be made, and makes it. Whatever goes wrong is told to the model."""
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
            if not (tool.harmless or await self._approve(call)):
                return Outcome(call, "refused", _REFUSED)
            async with asyncio.timeout(_SECONDS):
                return Outcome(call, "done", self._bounded(await tool.call(call.arguments)))
        except ToolFailed as error:
            return Outcome(call, "failed", self._bounded(f"Error: {error}"))
        except TimeoutError:
            return Outcome(call, "failed", f"Error: no result within {_SECONDS:g} seconds")
        except Exception as error:  # a tool's own fault is no reason to end the answer
            return Outcome(call, "failed", f"Error: {type(error).__name__}: {error}"[:500])

    def _bounded(self, text: str) -> str:
        return bounded(text, self._most)

    def _call(self, told: ToolCall) -> Call:
        # Nine letters and digits are what the strictest template (Mistral's) takes.
        number = "".join(secrets.choice(_ALPHABET) for _ in range(9))
        if told.arguments is None:
            return Call(number, told.name or "unknown", {"unreadable": told.raw[:2000]})
        return Call(number, told.name, told.arguments, self._tools.get(told.name))
