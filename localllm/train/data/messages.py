"""Messages as data sets write them: roles and contents, ShareGPT's from and value, dialogues."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from localllm.errors import InvalidRequest

Message = Mapping[str, Any]

_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "system": "system",
    "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool",
    "function_call": "assistant",
}  # fmt: skip
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")


def is_messages(value: Any) -> bool:
    """A list, or the JSON of one, as a cell of a table holds it."""
    if isinstance(value, str):
        return value.lstrip()[:1] == "["
    return isinstance(value, Sequence)


def messages_of(origin: str, key: str, value: Any) -> tuple[Message, ...]:
    """Messages with `role` and `content`. Raises InvalidRequest naming the one at fault."""
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidRequest(f"{origin}: '{key}' must be a list of messages")
    if not value:
        raise InvalidRequest(f"{origin}: '{key}' is empty")
    return tuple(
        _message(f"{origin}: message {number} of '{key}'", message)
        for number, message in enumerate(value, 1)
    )


def said(origin: str, key: str, value: Any, role: str) -> tuple[Message, ...]:
    """A text as one message of `role`, or messages as they are."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    return messages_of(origin, key, value)


def dialogue_of(text: str) -> str | list[Message]:
    """ "\\n\\nHuman: …\\n\\nAssistant: …" as messages; any other text as it is."""
    parts = _SPEAKER.split(text)
    if len(parts) < 5 or parts[0].strip() or parts[1] != "Human":
        return text
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": what}
        for who, what in zip(parts[1::2], parts[2::2], strict=True)
    ]


def tools_of(origin: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Function schemas, also as JSON. Raises InvalidRequest for anything else."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = _parsed(value)
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(one, Mapping) for one in value)
    ):
        raise InvalidRequest(f"{origin}: 'tools' must be a list of objects, or JSON of one")
    return tuple(value)


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} is no object")
    # Tables fill up what other rows have; templates ask whether a field is there at all.
    made = {key: value for key, value in message.items() if value is not None and value != []}
    if "role" not in made and "from" in made:
        made = _from_sharegpt(where, made)
    role = made.get("role")
    if not isinstance(role, str) or not role.strip():
        raise InvalidRequest(f"{where} has no role")
    if "tool_calls" in made:
        made["tool_calls"] = _calls(where, made["tool_calls"])
    elif "content" not in made and not (role == "assistant" and "content" in message):
        raise InvalidRequest(f"{where} ({role:.40}) has no content")
    made.setdefault("content", "")
    if not isinstance(made["content"], str | list):
        kind = type(made["content"]).__name__
        raise InvalidRequest(f"{where} ({role:.40}): the content must be text, not {kind}")
    return made


def _from_sharegpt(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    speaker, value = message["from"], message.get("value")
    role = _SHAREGPT.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise InvalidRequest(
            f"{where} is from {speaker!r:.40}, whom nobody knows",
            hint="known are " + ", ".join(_SHAREGPT),
        )
    if not isinstance(value, str):
        raise InvalidRequest(f"{where} (from {speaker}): 'value' must be text")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    if speaker != "function_call":
        return {"role": role, "content": value, **rest}
    call = _parsed(value)
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise InvalidRequest(f"{where} (from {speaker}) is no JSON with a name and arguments")
    return {"role": role, "content": "", "tool_calls": [{"function": dict(call)}], **rest}


def _calls(where: str, value: Any) -> list[Mapping[str, Any]]:
    """Calls with their arguments as objects: templates write them as JSON themselves."""
    if isinstance(value, str):
        value = _parsed(value)
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(call, Mapping) for call in value)
    ):
        raise InvalidRequest(f"{where}: 'tool_calls' must be a list of objects")
    return [_call(where, number, call) for number, call in enumerate(value, 1)]


def _call(where: str, number: int, call: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = call.get("function")
    if inner is not None and not isinstance(inner, Mapping):
        raise InvalidRequest(f"{where}: call {number} of 'tool_calls' has no function")
    function = dict(call if inner is None else inner)
    if not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where}: call {number} of 'tool_calls' has no name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments) if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise InvalidRequest(
            f"{where}: the arguments of call {number} must be an object, or JSON of one"
        )
    function["arguments"] = arguments
    if inner is None:
        return {"type": "function", "function": function}
    return {**call, "function": function}


def _parsed(text: str) -> Any:
    """What JSON says; None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
