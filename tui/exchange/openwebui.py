"""Open WebUI's export: a list of chats, each with a history of messages by their ids."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from typing import Any

from localllm.errors import InvalidRequest
from localllm.tui.exchange.trees import (
    MOST_MESSAGES,
    ChatTree,
    Node,
    checked,
    line,
    moment,
    ordered,
)

# Thinking is kept in the answer's text, as a folded quotation.
_THINKING = re.compile(
    r'\A\s*<details type="reasoning"[^>]*>\s*(?:<summary>[^<]*</summary>)?(.*?)</details>\s*',
    re.DOTALL,
)


def is_openwebui(found: Any) -> bool:
    first = found[0] if isinstance(found, list) and found else found
    if not isinstance(first, dict):
        return False
    chat = first.get("chat", first)
    return isinstance(chat, dict) and (
        isinstance(chat.get("history"), dict) or isinstance(chat.get("messages"), list)
    )


def read_chat(given: Any) -> ChatTree:
    """Raises InvalidRequest for what is no chat."""
    outer = given if isinstance(given, dict) else {}
    chat = outer.get("chat", outer)
    if not isinstance(chat, dict):
        raise InvalidRequest("it has no chat")
    nodes, head = _messages(chat)
    models = chat.get("models")
    model = models[0] if isinstance(models, list) and models else None
    parameters = chat.get("params")
    system = chat.get("system") or (
        parameters.get("system") if isinstance(parameters, dict) else None
    )
    meta = outer.get("meta")
    tags = meta.get("tags") if isinstance(meta, dict) else chat.get("tags")
    return checked(
        ChatTree(
            tuple(ordered(nodes, {})),
            head=head,
            title=line(chat.get("title") or outer.get("title")),
            created=moment(outer.get("created_at") or chat.get("timestamp")),
            updated=moment(outer.get("updated_at")),
            pinned=outer.get("pinned") is True,
            model=line(model) or None,
            system=system if isinstance(system, str) else "",
            tags=tuple(_tags(tags)),
        )
    )


def _messages(chat: Mapping[str, Any]) -> tuple[list[Node], str | None]:
    """Nodes and the last message's key, of the tree or, in old exports, of the plain list."""
    history = chat.get("history")
    by_key = history.get("messages") if isinstance(history, dict) else None
    if isinstance(by_key, dict) and by_key:
        if len(by_key) > MOST_MESSAGES:
            raise InvalidRequest(f"it has {len(by_key):,} messages, more than {MOST_MESSAGES:,}")
        nodes = [
            node
            for key, message in _in_order(by_key)
            if (node := _node(key, message, message.get("parentId"))) is not None
        ]
        head = history.get("currentId") if isinstance(history, dict) else None
        return nodes, head if isinstance(head, str) else None
    listed = chat.get("messages")
    if not isinstance(listed, list):
        raise InvalidRequest("it has no messages")
    nodes = []
    for number, message in enumerate(listed[: MOST_MESSAGES + 1]):
        before = nodes[-1].key if nodes else None
        if isinstance(message, dict) and (node := _node(str(number), message, before)) is not None:
            nodes.append(node)
    return nodes, nodes[-1].key if nodes else None


def _in_order(messages: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Siblings as their parent lists them, whatever order the file has them in."""
    places: dict[str, int] = {}
    for message in messages.values():
        children = message.get("childrenIds") if isinstance(message, dict) else None
        for place, child in enumerate(children if isinstance(children, list) else ()):
            if isinstance(child, str):
                places.setdefault(child, place)
    entries = [(key, one) for key, one in messages.items() if isinstance(one, dict)]
    yield from sorted(entries, key=lambda entry: places.get(entry[0], 0))


def _node(key: str, message: Mapping[str, Any], parent: Any) -> Node | None:
    role = message.get("role")
    if role not in ("user", "assistant", "system", "tool"):
        return None
    content = message.get("content")
    said = content if isinstance(content, str) else _parts(content)
    reasoning = ""
    if role == "assistant" and (match := _THINKING.match(said)):
        quoted = re.sub(r"^> ?", "", match[1].strip(), flags=re.MULTILINE)
        reasoning, said = html.unescape(quoted), said[match.end() :]
    return Node(
        key,
        parent if isinstance(parent, str) else None,
        role,
        said,
        reasoning,
        moment(message.get("timestamp")),
        status="complete" if message.get("done", True) is not False else "interrupted",
        model=line(message.get("model")) or None,
        rating=_rating(message),
    )


def _parts(content: Any) -> str:
    parts = content if isinstance(content, list) else []
    texts = [one.get("text") for one in parts if isinstance(one, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _rating(message: Mapping[str, Any]) -> int:
    told = message.get("annotation")
    rating = told.get("rating") if isinstance(told, dict) else None
    return rating if rating in (-1, 1) and type(rating) is int else 0


def _tags(given: Any) -> Iterator[str]:
    for one in given if isinstance(given, list) else ():
        name = one.get("name") if isinstance(one, dict) else one
        if isinstance(name, str):
            yield name
