"""What a row says: a chat, a prompt with its completion, a text, or two answers to one prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from localllm.errors import InvalidRequest

Kind = Literal["chat", "prompt-completion", "text", "preference"]
KINDS: tuple[Kind, ...] = ("chat", "prompt-completion", "text", "preference")
Message = Mapping[str, Any]

# (prompt, completion) by the names that data sets use.
_COMPLETIONS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "function": "tool", "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Chat:
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


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
    found: list[Kind] = []
    if "chosen" in row and "rejected" in row:
        found.append("preference")
    elif any(a in row and b in row for a, b in _COMPLETIONS):
        found.append("prompt-completion")
    if any(isinstance(row.get(key), Sequence) and not isinstance(row.get(key), str)
           for key in ("messages", "conversations")):  # fmt: skip
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
    key = "messages" if "messages" in row else "conversations"
    if key not in row:
        raise InvalidRequest(f"{origin}: there is no 'messages' in this row")
    messages = _messages(origin, key, row[key])
    system = row.get("system")
    if isinstance(system, str) and system and messages and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    return Chat(messages, _tools(origin, row.get("tools")))


def _completion(origin: str, row: Mapping[str, Any]) -> Chat | Completion:
    for prompt_key, completion_key in _COMPLETIONS:
        if prompt_key in row and completion_key in row:
            break
    else:
        raise InvalidRequest(f"{origin}: there is no prompt with a completion in this row")
    prompt, completion = row[prompt_key], row[completion_key]
    if isinstance(prompt, str) and isinstance(completion, str):
        more = row.get("input") if prompt_key == "instruction" else None
        if isinstance(more, str) and more.strip():
            prompt = f"{prompt}\n\n{more}"
        return Completion(prompt, completion)
    start = _said(origin, prompt_key, prompt, "user")
    end = _said(origin, completion_key, completion, "assistant")
    return Chat((*start, *end), _tools(origin, row.get("tools")))


def _pair(origin: str, row: Mapping[str, Any]) -> Pair:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise InvalidRequest(f"{origin}: there is no '{key}' in this row")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        return Pair(Completion(prompt, chosen), Completion(prompt, rejected))
    tools = _tools(origin, row.get("tools"))
    start = () if prompt is None else _said(origin, "prompt", prompt, "user")
    sides = []
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        said = _said(origin, key, side, "assistant")
        sides.append(Chat((*start, *said), tools))
    if prompt is None and isinstance(chosen, str):
        raise InvalidRequest(f"{origin}: there is no 'prompt' in this row")
    if sides[0].messages[:-1] != sides[1].messages[:-1]:
        raise InvalidRequest(
            f"{origin}: 'chosen' and 'rejected' must differ in their last message alone"
        )
    return Pair(sides[0], sides[1])


def _said(origin: str, key: str, value: Any, role: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    return _messages(origin, key, value)


def _messages(origin: str, key: str, value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise InvalidRequest(f"{origin}: '{key}' must be a list of messages")
    found = []
    for number, message in enumerate(value, 1):
        where = f"{origin}: message {number} of '{key}'"
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"{where} is no object")
        if "role" not in message and "from" in message:
            role = _SHAREGPT.get(str(message["from"]))
            if role is None:
                raise InvalidRequest(f"{where} is from {message['from']!r:.40}, whom nobody knows")
            message = {"role": role, "content": message.get("value", "")}
        if not isinstance(message.get("role"), str):
            raise InvalidRequest(f"{where} has no role")
        # Parquet fills up what other rows have.
        found.append({key: value for key, value in message.items() if value is not None})
        found[-1].setdefault("content", "")
    if not found:
        raise InvalidRequest(f"{origin}: '{key}' is empty")
    return tuple(found)


def _tools(origin: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidRequest(f"{origin}: 'tools' is no JSON") from None
    if not isinstance(value, Sequence) or not all(isinstance(one, Mapping) for one in value):
        raise InvalidRequest(f"{origin}: 'tools' must be a list of objects")
    return tuple(value)


def _string(origin: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"{origin}: '{key}' must be text, not {type(value).__name__}")
    return value


def _listed(row: Mapping[str, Any]) -> str:
    names = [repr(str(key)[:40]) for key in list(row)[:6]]
    return ", ".join(names) + (" …" if len(row) > 6 else "") if names else "no fields"
