"""What a row says: a chat, a prompt with its completion, a text, or two answers to one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from localllm.errors import InvalidRequest
from localllm.train.data.messages import (
    Message,
    dialogue_of,
    is_messages,
    messages_of,
    said,
    tools_of,
)

Kind = Literal["chat", "prompt-completion", "text", "preference"]
KINDS: tuple[Kind, ...] = ("chat", "prompt-completion", "text", "preference")

# (prompt, completion) by the names that data sets use.
_COMPLETIONS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)


@dataclass(frozen=True)
class Chat:
    """prompt: so many messages at the beginning are never trained."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    prompt: int = 0


@dataclass(frozen=True)
class Completion:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Pair:
    """Two of a kind, the chosen one first."""

    chosen: Chat | Completion
    rejected: Chat | Completion


Item = Chat | Completion | Text | Pair


def kind_of(origin: str, row: Mapping[str, Any]) -> Kind:
    """Raises InvalidRequest where a row could be two things, or is none."""
    given = {key for key, value in row.items() if value is not None}
    found: list[Kind] = []
    if {"chosen", "rejected"} <= given:
        found.append("preference")
    elif any({a, b} <= given for a, b in _COMPLETIONS):
        found.append("prompt-completion")
    if any(is_messages(row.get(key)) for key in ("messages", "conversations")):
        found.append("chat")
    if isinstance(row.get("text"), str):
        found.append("text")
    if len(found) == 1:
        return found[0]
    if not found:
        raise InvalidRequest(
            f"{origin}: a row with {_listed(row)} is of no known format",
            hint="messages; prompt and completion; text; or prompt, chosen and rejected",
        )
    raise InvalidRequest(
        f"{origin}: the row could be {' or '.join(found)}", hint="say which with --kind"
    )


def item_of(origin: str, row: Mapping[str, Any], kind: Kind) -> Item:
    """Raises InvalidRequest naming the field at fault."""
    if kind == "text":
        return Text(_string(origin, row, "text"))
    if kind == "preference":
        return _pair(origin, row)
    if kind == "chat":
        return _chat(origin, row)
    return _completion(origin, row)


def _chat(origin: str, row: Mapping[str, Any]) -> Chat:
    key = "messages" if row.get("messages") is not None else "conversations"
    if row.get(key) is None:
        raise _missing(origin, row, "messages")
    messages = messages_of(origin, key, row[key])
    return Chat(_with_system(row, messages), tools_of(origin, row.get("tools")))


def _completion(origin: str, row: Mapping[str, Any]) -> Chat | Completion:
    for prompt_key, completion_key in _COMPLETIONS:
        if row.get(prompt_key) is not None and row.get(completion_key) is not None:
            break
    else:
        raise _missing(origin, row, "prompt' with a 'completion")
    prompt, completion = row[prompt_key], row[completion_key]
    if isinstance(prompt, str) and prompt_key == "instruction":
        more = row.get("input")
        if isinstance(more, str) and more.strip():
            prompt = f"{prompt}\n\n{more}"
    system = _system(row)
    if isinstance(prompt, str) and isinstance(completion, str) and not system:
        return Completion(prompt, completion)
    start = _with_system(row, said(origin, prompt_key, prompt, "user"))
    end = said(origin, completion_key, completion, "assistant")
    return Chat((*start, *end), tools_of(origin, row.get("tools")), prompt=len(start))


def _pair(origin: str, row: Mapping[str, Any]) -> Pair:
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise _missing(origin, row, key)
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str) and not _system(row):
            return Pair(Completion(prompt, chosen), Completion(prompt, rejected))
        if prompt is None:
            chosen, rejected = dialogue_of(chosen), dialogue_of(rejected)
    if prompt is None and (isinstance(chosen, str) or isinstance(rejected, str)):
        raise InvalidRequest(
            f"{origin}: there is no 'prompt' in this row",
            hint="without one, chosen and rejected are whole conversations: lists of messages",
        )
    tools = tools_of(origin, row.get("tools"))
    start = () if prompt is None else said(origin, "prompt", prompt, "user")
    sides = []
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        messages = said(origin, key, side, "assistant")
        if messages[: len(start)] != start:  # some data sets repeat the prompt in both
            messages = (*start, *messages)
        messages = _with_system(row, messages)
        if messages[-1]["role"] != "assistant":
            raise InvalidRequest(f"{origin}: '{key}' must end with a message of the assistant")
        sides.append(Chat(messages, tools, prompt=len(messages) - 1))
    if sides[0].messages[:-1] != sides[1].messages[:-1]:
        raise InvalidRequest(
            f"{origin}: 'chosen' and 'rejected' must differ in their last message alone"
        )
    return Pair(sides[0], sides[1])


def _system(row: Mapping[str, Any]) -> str:
    """Some data sets have the system message in a field of its own."""
    system = row.get("system")
    return system if isinstance(system, str) and system.strip() else ""


def _with_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    system = _system(row)
    if not system or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": system}, *messages)


def _string(origin: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        raise _missing(origin, row, key)
    if not isinstance(value, str):
        raise InvalidRequest(f"{origin}: '{key}' must be text, not {type(value).__name__}")
    return value


def _missing(origin: str, row: Mapping[str, Any], what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{origin}: there is no '{what}' in this row, which has {_listed(row)}",
        hint="every row of a file is of one kind, as its first or as --kind says",
    )


def _listed(row: Mapping[str, Any]) -> str:
    names: Sequence[str] = [repr(str(key)[:40]) for key in list(row)[:6]]
    return ", ".join(names) + (" …" if len(row) > 6 else "") if names else "no fields"
