"""A chat on its way between the store and a file, and what makes two of them the same."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, get_args

from localllm.errors import InvalidRequest
from localllm.tui.store import Message, Status, Store
from localllm.tui.store.records import Role

MOST_MESSAGES = 50_000  # of a chat
MOST_TEXT = 16 << 20  # characters of a message
_MOST_JSON = 1 << 18  # characters of a message's params or extra
_MOST_LINE = 500  # characters of a title, a name …
_MOST_TAGS = 50
_LATEST = 4_102_444_800.0  # 2100: what is later was no time in seconds
OF_OTHERS = ("edited_from", "forked_from")  # in a message's extra: another one's key, as a number
ROLES = frozenset(get_args(Role))
_STATUSES = frozenset(get_args(Status)) - {"writing"}
_EXTRAS: Mapping[str, type] = {
    "tool_calls": list,
    "tool_call_id": str,
    "name": str,
    "attachments": list,
    "typed": int,
    "error": str,
    "state": str,
    "arguments": dict,
    "prefix": str,
    "edited_from": int,
    "forked_from": int,
}


@dataclass(frozen=True)
class Node:
    """A message. key: unique in its tree; parent: the key of the one before, None for a first."""

    key: str
    parent: str | None
    role: str
    content: str
    reasoning: str = ""
    created: float | None = None
    status: str = "complete"
    model: str | None = None
    adapter: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    receipt: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    rating: int = 0


@dataclass(frozen=True)
class ChatTree:
    """A chat with all its branches. nodes: every one after its parent, siblings in their order.

    head: the key of the message that the open branch ends with.
    """

    nodes: tuple[Node, ...]
    head: str | None = None
    title: str = ""
    created: float | None = None
    updated: float | None = None
    pinned: bool = False
    model: str | None = None
    system: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""
    adapter: str | None = None
    adapter_weight: float = 1.0
    tags: tuple[str, ...] = ()


def tree_of(store: Store, chat: int) -> ChatTree:
    """Raises KeyError for a chat that is not there."""
    found = store.chat(chat)
    return ChatTree(
        tuple(_node(message) for message in store.tree(chat)),
        head=None if found.head is None else str(found.head),
        title=found.title,
        created=found.created,
        updated=found.updated,
        pinned=found.pinned,
        model=found.model,
        system=found.system,
        params=found.params,
        folder=found.folder,
        adapter=found.adapter,
        adapter_weight=found.adapter_weight,
        tags=found.tags,
    )


def _node(message: Message) -> Node:
    return Node(
        str(message.id),
        None if message.parent is None else str(message.parent),
        message.role,
        message.content,
        message.reasoning,
        message.created,
        "interrupted" if message.status == "writing" else message.status,
        message.model,
        message.adapter,
        message.params,
        message.receipt,
        message.extra,
        message.rating,
    )


def paths_of(tree: ChatTree) -> frozenset[bytes]:
    """A name for each message: what it says, and all that was said before it.

    A tree whose names are all among another's says nothing that the other does not.
    """
    names: dict[str | None, bytes] = {None: b""}
    for node in tree.nodes:
        said = json.dumps([node.role, node.content, node.reasoning]).encode()
        names[node.key] = hashlib.sha256(names[node.parent] + said).digest()
    del names[None]
    return frozenset(names.values())


# ---- what comes from a file that anybody may have written


def checked(tree: ChatTree) -> ChatTree:
    """The tree with nothing in it that the app could not bear.

    Raises InvalidRequest for one that is no tree, or beyond all bounds. Fields that make no sense
    are as if they were not given.
    """
    if len(tree.nodes) > MOST_MESSAGES:
        raise InvalidRequest(f"it has {len(tree.nodes):,} messages, more than {MOST_MESSAGES:,}")
    keys: set[str] = set()
    nodes = []
    for node in tree.nodes:
        if node.key in keys or (node.parent is not None and node.parent not in keys):
            raise InvalidRequest("its messages are no tree")
        keys.add(node.key)
        nodes.append(_checked_node(node))
    return replace(
        tree,
        nodes=tuple(nodes),
        head=tree.head if tree.head in keys else (nodes[-1].key if nodes else None),
        title=line(tree.title),
        created=moment(tree.created),
        updated=moment(tree.updated),
        pinned=tree.pinned is True,
        model=line(tree.model) or None,
        system=text(tree.system),
        params=_plain(tree.params),
        folder=line(tree.folder),
        adapter=line(tree.adapter) or None,
        adapter_weight=_weight(tree.adapter_weight),
        tags=tuple(tag for one in tree.tags[:_MOST_TAGS] if (tag := line(one))),
    )


def _checked_node(node: Node) -> Node:
    if node.role not in ROLES:
        raise InvalidRequest(f"a message has the role {str(node.role)[:40]!r}")
    for said in (node.content, node.reasoning):
        if not isinstance(said, str):
            raise InvalidRequest("a message is no text")
        if len(said) > MOST_TEXT:
            raise InvalidRequest(f"a message has {len(said):,} characters, more than {MOST_TEXT:,}")
    status = node.status
    if status not in _STATUSES:
        status = "interrupted" if status == "writing" else "complete"
    return replace(
        node,
        content=text(node.content),
        reasoning=text(node.reasoning),
        created=moment(node.created),
        status=status,
        model=line(node.model) or None,
        adapter=line(node.adapter) or None,
        params=_plain(node.params),
        receipt=_receipt(node.receipt),
        extra=_extra(node.extra),
        rating=node.rating if node.rating in (-1, 0, 1) and type(node.rating) is int else 0,
    )


def text(value: Any) -> str:
    """Text that can be stored: lone halves of characters, which no file can hold, are replaced."""
    if not isinstance(value, str):
        return ""
    if len(value) > MOST_TEXT:
        raise InvalidRequest(f"a text has {len(value):,} characters, more than {MOST_TEXT:,}")
    return value.encode("utf-8", "replace").decode()


def line(value: Any) -> str:
    """One short line; "" for what is no text."""
    return text(value[:_MOST_LINE]).replace("\n", " ") if isinstance(value, str) else ""


def moment(value: Any) -> float | None:
    """Seconds since 1970, also from milliseconds; None for what is no time."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        seconds = float(value)
    except OverflowError:
        return None
    if seconds > 1e11:
        seconds /= 1000
    return seconds if math.isfinite(seconds) and 0 <= seconds <= _LATEST else None


def _weight(value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100
    return float(value) if good else 1.0


def _plain(value: Any) -> Mapping[str, Any]:
    """JSON of bearable size, else nothing."""
    if not isinstance(value, Mapping):
        return {}
    try:
        if len(json.dumps(dict(value))) > _MOST_JSON:
            return {}
    except (TypeError, ValueError, RecursionError):
        return {}
    return {str(name): part for name, part in value.items()}


def _receipt(value: Any) -> Mapping[str, Any]:
    """Fields of a Receipt that are what a Receipt has."""
    forms = _receipt_forms()
    given = _plain(value)
    return {
        name: part
        for name, part in given.items()
        if name in forms and isinstance(part, forms[name]) and not isinstance(part, bool)
    }


@cache
def _receipt_forms() -> Mapping[str, tuple[type, ...]]:
    from localllm.engine.receipt import Receipt

    known: Mapping[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "str": (str,),
        "None": (type(None),),
    }
    return {
        one.name: tuple(kind for part in str(one.type).split(" | ") for kind in known[part])
        for one in fields(Receipt)
    }


def _extra(value: Any) -> Mapping[str, Any]:
    given = _plain(value)
    found: dict[str, Any] = {
        name: part
        for name, part in given.items()
        if name in _EXTRAS and isinstance(part, _EXTRAS[name]) and not isinstance(part, bool)
    }
    if not all(_is_attachment(one) for one in found.get("attachments", ())):
        del found["attachments"]
    if not all(_is_call(one) for one in found.get("tool_calls", ())):
        del found["tool_calls"]
    return found


def _is_attachment(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and type(value.get("bytes")) is int
    )


def _is_call(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), dict | str)
    )


def ordered(nodes: Iterable[Node], skipped: Mapping[str, str | None]) -> list[Node]:
    """Nodes as a tree: each after its parent, first ones first, siblings in their order.

    skipped: keys of messages that are left out -> their parents; what follows one follows its
    parent instead. What hangs on nothing, or on itself, becomes a first message.
    """
    nodes = list(nodes)
    keys = {node.key for node in nodes}
    children: dict[str | None, list[Node]] = {}
    for node in nodes:
        parent, seen = node.parent, set[str]()
        while parent is not None and parent not in keys:
            if parent in seen or parent not in skipped:
                parent = None
                break
            seen.add(parent)
            parent = skipped[parent]
        children.setdefault(parent, []).append(replace(node, parent=parent))
    found: list[Node] = []
    done: set[str] = set()

    def follow(start: Node) -> None:
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if node.key in done:
                continue
            done.add(node.key)
            found.append(node)
            waiting += reversed(children.get(node.key, []))

    for node in children.get(None, []):
        follow(node)
    for node in nodes:  # those that go round in circles
        if node.key not in done:
            follow(replace(node, parent=None))
    return found
