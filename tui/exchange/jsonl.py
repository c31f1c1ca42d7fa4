"""Chats as JSON lines, with every branch and all that is known of them.

{"localllm": "chats", "version": 1}
{"chat": {"title": …, "head": "12", …}}
{"message": {"key": "10", "parent": null, "role": "user", "content": …}}
…
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from localllm.errors import InvalidRequest
from localllm.tui.exchange.files import parsed, write_whole
from localllm.tui.exchange.trees import MOST_MESSAGES, ChatTree, Node, checked, tree_of
from localllm.tui.store import Store

VERSION = 1
_PAGE = 200
_CHAT = frozenset(one.name for one in fields(ChatTree)) - {"nodes"}
_NODE = frozenset(one.name for one in fields(Node))


def write_jsonl(store: Store, path: Path, chats: Iterable[int] | None = None) -> int:
    """How many were written. chats: which; None for all. Empty ones are left out.

    Raises StoreError.
    """
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        yield json.dumps({"localllm": "chats", "version": VERSION}) + "\n"
        for chat in _all(store) if chats is None else chats:
            tree = tree_of(store, chat)
            if tree.nodes:
                count += 1
                yield from jsonl_of(tree)

    write_whole(path, lines())
    return count


def jsonl_of(tree: ChatTree) -> Iterator[str]:
    told = {name: getattr(tree, name) for name in sorted(_CHAT)}
    yield json.dumps({"chat": told}, ensure_ascii=False) + "\n"
    for node in tree.nodes:
        yield json.dumps({"message": asdict(node)}, ensure_ascii=False) + "\n"


def is_ours(first: str) -> bool:
    """Whether a file that begins with this line is one of these."""
    try:
        head = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(head, dict) and head.get("localllm") == "chats"


def read_jsonl(lines: Iterator[str]) -> Iterator[ChatTree | InvalidRequest]:
    """The chats, or what is wrong with one. Raises InvalidRequest for a newer file."""
    head = parsed(next(lines, ""), "line 1")
    if not isinstance(head.get("version"), int) or head["version"] > VERSION:
        raise InvalidRequest(
            f"the file is of version {head.get('version')!r}, this localllm reads {VERSION}",
            hint="a newer localllm reads it",
        )
    chat: Mapping[str, Any] | None = None
    nodes: list[Node] = []
    wrong: InvalidRequest | None = None
    for number, text in enumerate(lines, 2):
        if not text.strip():
            continue
        try:
            message = parsed(text, f"line {number}")
            if isinstance(message, dict) and isinstance(message.get("chat"), dict):
                if chat is not None:
                    yield wrong or _tree(chat, nodes)
                chat, nodes, wrong = message["chat"], [], None
            elif isinstance(message, dict) and isinstance(message.get("message"), dict):
                if chat is None:
                    raise InvalidRequest(f"line {number}: a message without a chat")
                if len(nodes) <= MOST_MESSAGES:
                    nodes.append(_node(message["message"], number))
            else:
                raise InvalidRequest(f"line {number} is no chat and no message")
        except InvalidRequest as error:
            wrong = wrong or error
            if chat is None:
                yield error
                wrong = None
    if chat is not None:
        yield wrong or _tree(chat, nodes)


def _tree(chat: Mapping[str, Any], nodes: list[Node]) -> ChatTree | InvalidRequest:
    given = {name: value for name, value in chat.items() if name in _CHAT}
    tags = given.get("tags")
    given["tags"] = tuple(tags) if isinstance(tags, list) else ()
    head = given.get("head")
    given["head"] = head if isinstance(head, str) else None
    try:
        return checked(ChatTree(tuple(nodes), **given))
    except InvalidRequest as error:
        title = str(chat.get("title"))[:80]
        return InvalidRequest(f"chat {title!r}: {error}")


def _node(given: Mapping[str, Any], number: int) -> Node:
    known = {name: value for name, value in given.items() if name in _NODE}
    key, parent = known.get("key"), known.get("parent")
    if not isinstance(key, str) or not (parent is None or isinstance(parent, str)):
        raise InvalidRequest(f"line {number}: a message needs a key, and its parent's or null")
    for name in ("role", "content"):
        if not isinstance(known.get(name), str):
            raise InvalidRequest(f"line {number}: a message needs a {name}")
    return Node(**known)


def _all(store: Store) -> Iterator[int]:
    offset = 0
    while page := store.chats(limit=_PAGE, offset=offset):
        yield from (chat.id for chat in page)
        offset += _PAGE
