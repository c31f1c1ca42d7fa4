"""A function that a model may call, a call of it, and what came of that."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from localllm.errors import LocalLLMError

MOST_RESULT = 32_768  # characters of a result; what is more is cut off, and said to be
_ODD = re.compile(r"[^A-Za-z0-9_-]")
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class ToolFailed(LocalLLMError):
    """A call that came to nothing. The model is told the message, and may try again."""


@dataclass(frozen=True)
class Tool:
    """name: "server/tool" for one of an MCP server. parameters: a JSON schema of its arguments.

    call: gives a text of any length; raises ToolFailed for what the model should be told.
    harmless: it reads and changes nothing of this machine, so that nobody needs to be asked.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    call: Callable[[Mapping[str, Any]], Awaitable[str]]
    source: str = "built in"
    harmless: bool = False

    @property
    def called(self) -> str:
        """What the model knows it by: letters, digits, _ and - are what every template takes."""
        return _ODD.sub("_", self.name.replace("/", "__"))[:64]

    @property
    def schema(self) -> dict[str, Any]:
        """As it is offered to a model."""
        function = {
            "name": self.called,
            "description": self.description,
            "parameters": dict(self.parameters) or {"type": "object", "properties": {}},
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Call:
    """A call that the model wants made. tool: None where there is none of that name."""

    id: str
    name: str
    arguments: Mapping[str, Any]
    tool: Tool | None = None

    @property
    def message(self) -> dict[str, Any]:
        """As an entry of a message's `tool_calls`."""
        function = {"name": self.name, "arguments": dict(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Outcome:
    """What came of a call, and what the model is told of it."""

    call: Call
    state: Literal["done", "refused", "failed"]
    text: str

    @property
    def message(self) -> dict[str, Any]:
        """For the model, after the message that made the call."""
        return {
            "role": "tool",
            "tool_call_id": self.call.id,
            "name": self.call.name,
            "content": self.text,
        }


def bounded(text: str, most: int = MOST_RESULT) -> str:
    """A result of bearable length, which says how much was cut off."""
    if len(text) <= most:
        return text
    return f"{text[:most]}\n[{len(text) - most:,} characters more were left out]"


def check_arguments(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Raises ToolFailed for arguments that are missing, of another type or unknown.

    Looks at the first level alone; the tool itself knows the rest.
    """
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    required = schema.get("required")
    for name in required if isinstance(required, list) else ():
        if name not in arguments:
            raise ToolFailed(f"the argument {name!r} is missing")
    for name, value in arguments.items():
        form = properties.get(name)
        if not isinstance(form, Mapping):
            if schema.get("additionalProperties") is False:
                known = ", ".join(properties) or "none"
                raise ToolFailed(f"there is no argument {name!r}; there are: {known}")
            continue
        wanted = form.get("type")
        kinds = wanted if isinstance(wanted, list) else [wanted]
        if not any(_is(value, kind) for kind in kinds):
            raise ToolFailed(
                f"the argument {name!r} must be of type {' or '.join(map(str, kinds))}"
            )
        choices = form.get("enum")
        if isinstance(choices, list) and value not in choices:
            raise ToolFailed(f"the argument {name!r} must be one of {choices}")


def _is(value: Any, kind: Any) -> bool:
    types = _TYPES.get(kind) if isinstance(kind, str) else None
    if types is None:
        return True  # a form that is not looked into
    if isinstance(value, bool):
        return bool in types
    whole = kind == "integer" and isinstance(value, float) and value.is_integer()
    return whole or isinstance(value, types)
