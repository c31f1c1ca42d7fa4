"""One branch of a chat as Markdown, for people; read back exactly where this program wrote it.

Before each message stands a comment with its length, so that whatever its text looks like, it is
one message. Where the text was changed by hand, the next comment ends it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from localllm.errors import InvalidRequest
from localllm.tui.exchange.files import parsed, write_whole
from localllm.tui.exchange.trees import ChatTree, Node, checked
from localllm.tui.store import Message, Store
from localllm.tui.text import one_line

_CHAT = "localllm:chat"
_MESSAGE = "localllm:message"
_MARK = re.compile(r"^<!-- localllm:(chat|message) (\{.*\}) -->$", re.MULTILINE)
_NAMES = {"user": "You", "assistant": "Assistant", "system": "System", "tool": "Tool"}
_OPEN, _CLOSE = "<details><summary>Thinking</summary>\n\n", "\n\n</details>\n\n"


def write_markdown(store: Store, chat: int, path: Path, head: int | None = None) -> None:
    """Raises StoreError, KeyError for a chat that is not there."""
    write_whole(path, [markdown_of(store, chat, head)])


def markdown_of(store: Store, chat: int, head: int | None = None) -> str:
    """head: the last message of the branch; None for the open one."""
    found = store.chat(chat)
    facts = {
        "version": 1,
        "title": found.title,
        "created": found.created,
        "model": found.model,
        "system": found.system,
        "tags": list(found.tags),
        "folder": found.folder,
    }
    parts = [f"# {one_line(found.title) or 'Chat'}\n\n{_comment(_CHAT, facts)}\n"]
    if found.system:
        parts.append(f"\n> {one_line(found.system)}\n")
    parts += map(_told, store.branch(found.head if head is None else head))
    return "".join(parts)


def _told(message: Message) -> str:
    facts = {
        "role": message.role,
        "created": message.created,
        "status": message.status,
        "model": message.model,
        "characters": len(message.content),
        "thinking": len(message.reasoning),
        "extra": dict(message.extra),
    }
    thinking = f"{_OPEN}{message.reasoning}{_CLOSE}" if message.reasoning else ""
    heading = f"## {_NAMES[message.role]}"
    return f"\n{heading}\n\n{_comment(_MESSAGE, facts)}\n\n{thinking}{message.content}\n"


def _comment(name: str, facts: Mapping[str, Any]) -> str:
    # > would end the comment, were it part of -->.
    text = json.dumps(facts).replace(">", "\\u003e").replace("<", "\\u003c")
    return f"<!-- {name} {text} -->"


def is_ours(text: str) -> bool:
    match = _MARK.search(text)
    return match is not None and match[1] == "chat"


def read_markdown(text: str) -> ChatTree:
    """Raises InvalidRequest for what this program has not written."""
    head = _MARK.search(text)
    if head is None or head[1] != "chat":
        raise InvalidRequest(
            "this Markdown was not written by localllm",
            hint="chats of other programs are read from their own exports",
        )
    facts = parsed(head[2], "the comment at the top")
    nodes = list(_nodes(text, head.end()))
    tags = facts.get("tags")
    return checked(
        ChatTree(
            tuple(nodes),
            title=facts.get("title", ""),
            created=facts.get("created"),
            model=facts.get("model"),
            system=facts.get("system", ""),
            folder=facts.get("folder", ""),
            tags=tuple(tags) if isinstance(tags, list) else (),
        )
    )


def _nodes(text: str, at: int) -> Iterator[Node]:
    parent: str | None = None
    number = 0
    while (mark := _next(text, at)) is not None:
        facts = parsed(mark[2], f"the comment of message {number + 1}")
        content, reasoning, at = _body(text, mark.end() + 2, facts)
        yield Node(
            str(number),
            parent,
            facts.get("role", ""),
            content,
            reasoning,
            facts.get("created"),
            facts.get("status", "complete"),
            facts.get("model"),
            extra=facts.get("extra", {}),
        )
        parent, number = str(number), number + 1


def _next(text: str, at: int) -> re.Match[str] | None:
    for mark in _MARK.finditer(text, at):
        if mark[1] == "message":
            return mark
    return None


def _body(text: str, start: int, facts: Mapping[str, Any]) -> tuple[str, str, int]:
    """Content, thinking, and the place after them."""
    said, thought = _count(facts.get("characters")), _count(facts.get("thinking"))
    at, reasoning = start, ""
    if thought:
        inner = start + len(_OPEN)
        if text[start:inner] == _OPEN and text.startswith(_CLOSE, inner + thought):
            reasoning, at = text[inner : inner + thought], inner + thought + len(_CLOSE)
    end = at + said
    if text[end : end + 1] == "\n" and (thought == 0 or reasoning) and _at_an_end(text, end + 1):
        return text[at:end], reasoning, end
    # Changed by hand: up to the next message's heading.
    following = _next(text, start)
    if following is None:
        return text[start:].strip("\n"), "", len(text)
    body = text[start : following.start()].rstrip("\n")
    body = body.rpartition("\n## ")[0] if "\n## " in body else body
    return body.strip("\n"), "", following.start()


def _at_an_end(text: str, at: int) -> bool:
    """Whether the file ends here, or a message's heading and comment follow."""
    if at >= len(text):
        return True
    return re.compile(r"\n## \w+\n\n<!-- localllm:message ").match(text, at) is not None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
