"""Check a conversation before a template sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from localllm.errors import InvalidRequest

Message = Mapping[str, Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as dicts of their own. Raises `InvalidRequest` naming the message at fault.

    A message has a `role`, and a `content` that is text or a list of text parts; an assistant
    message with `tool_calls` may have no content.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest(
            "messages must be a list of messages", hint='[{"role": "user", "content": "Hello"}]'
        )
    if not messages:
        raise InvalidRequest("messages is empty: a chat needs at least one message")
    return [_named(_check(message, f"messages[{i}]")) for i, message in enumerate(messages)]


def _named(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning, if it has any, under each name that templates look for."""
    given = (message[name] for name in _REASONING if message.get(name) is not None)
    reasoning = next(given, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _check(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be a dict, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role.strip():
        given = "is missing" if "role" not in message else f"must be a name, not {role!r}"
        raise InvalidRequest(f"{where}: 'role' {given}", hint="system, user, assistant or tool")
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise InvalidRequest(
                f"{where} ({role}): 'content' is missing",
                hint="only a message with tool_calls may have none",
            )
        return {"content": None, **message}
    if isinstance(content, str):
        check_unicode(content, f"{where} ({role}): 'content'")
        return dict(message)
    if not isinstance(content, list | tuple):
        raise InvalidRequest(
            f"{where} ({role}): 'content' must be text or a list of text parts, "
            f"not {type(content).__name__}"
        )
    return {
        **message,
        "content": [_check_part(p, f"{where}.content[{i}]", role) for i, p in enumerate(content)],
    }


def _check_part(part: Any, where: str, role: str) -> dict[str, Any]:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise InvalidRequest(
            f"{where} ({role}) is no content part", hint='{"type": "text", "text": "Hello"}'
        )
    if part["type"] != "text":
        raise InvalidRequest(
            f"{where} ({role}) is a part of type {part['type']!r}; only text parts are supported"
        )
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{where} ({role}): 'text' must be text")
    check_unicode(part["text"], f"{where} ({role})")
    return dict(part)


def check_unicode(text: str, where: str) -> None:
    """Raises `InvalidRequest` for lone surrogates: they are no characters, and have no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{where} holds a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which is not valid Unicode",
            hint="decode the text as UTF-8, or join the surrogate pair, before passing it on",
        ) from None


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
    """The tools as a list, or None for none. Raises `InvalidRequest` naming the one at fault."""
    if not tools:
        return None
    if not isinstance(tools, list | tuple):
        raise InvalidRequest("tools must be a list of function schemas")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequest(
                f"tools[{i}] must be a dict, not {type(tool).__name__}",
                hint='{"type": "function", "function": {"name": …, "parameters": {…}}}',
            )
    return list(tools)


def join_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its text parts joined by newlines into one text."""
    content = message["content"]
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def split_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its text as a list of one part."""
    content = message["content"]
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}
