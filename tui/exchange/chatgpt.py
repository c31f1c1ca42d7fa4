"""ChatGPT's export: `conversations.json`, a list of conversations with a mapping of messages."""

from __future__ import annotations

from collections.abc import Mapping
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


def is_chatgpt(found: Any) -> bool:
    first = found[0] if isinstance(found, list) and found else found
    return isinstance(first, dict) and isinstance(first.get("mapping"), dict)


def read_conversation(given: Any) -> ChatTree:
    """Raises InvalidRequest for what is no conversation.

    What ChatGPT hides from its user is left out; thoughts go to the answer that follows them.
    """
    if not isinstance(given, dict) or not isinstance(given.get("mapping"), dict):
        raise InvalidRequest("it has no mapping of messages")
    mapping: dict[str, Any] = given["mapping"]
    if len(mapping) > MOST_MESSAGES:
        raise InvalidRequest(f"it has {len(mapping):,} messages, more than {MOST_MESSAGES:,}")
    nodes: list[Node] = []
    skipped: dict[str, str | None] = {}
    thoughts: dict[str, str] = {}
    for key, entry in mapping.items():
        if not isinstance(entry, dict):
            continue
        told = entry.get("parent")
        parent = told if isinstance(told, str) else None
        message = entry.get("message")
        if isinstance(message, dict):
            node = _node(key, parent, message)
            if node is not None:
                nodes.append(node)
                continue
            if thought := _thought(message):
                thoughts[key] = thought
        skipped[key] = parent
    tree = [_with_thoughts(node, mapping, thoughts, skipped) for node in nodes]
    head = given.get("current_node")
    kept = {node.key for node in tree}
    seen: set[str] = set()
    while isinstance(head, str) and head not in kept and head not in seen:
        seen.add(head)
        head = skipped.get(head)
    return checked(
        ChatTree(
            tuple(ordered(tree, skipped)),
            head=head if isinstance(head, str) else None,
            title=line(given.get("title")),
            created=moment(given.get("create_time")),
            updated=moment(given.get("update_time")),
        )
    )


def _node(key: str, parent: str | None, message: Mapping[str, Any]) -> Node | None:
    """None for what is not shown."""
    author, metadata = _dict(message.get("author")), _dict(message.get("metadata"))
    role = author.get("role")
    if role not in ("user", "assistant", "system", "tool"):
        return None
    if metadata.get("is_visually_hidden_from_conversation") is True:
        return None
    said = _text(_dict(message.get("content")))
    if not said.strip():
        return None
    extra: dict[str, Any] = {}
    if role == "tool" and isinstance(author.get("name"), str):
        extra["name"] = author["name"]
    model = metadata.get("model_slug")
    return Node(
        key,
        parent,
        role,
        said,
        created=moment(message.get("create_time")),
        model=line(model) or None if role == "assistant" else None,
        extra=extra,
    )


def _text(content: Mapping[str, Any]) -> str:
    kind = content.get("content_type")
    if kind in ("text", "multimodal_text"):
        parts = content.get("parts")
        return "\n".join(map(_part, parts)) if isinstance(parts, list) else ""
    if kind == "code":
        language = content.get("language")
        name = language if isinstance(language, str) and language.isalnum() else ""
        name = "" if name == "unknown" else name
        return _fenced(_str(content.get("text")), name)
    if kind == "execution_output":
        return _fenced(_str(content.get("text")), "")
    if kind in ("tether_quote", "tether_browsing_display", "system_error"):
        return _str(content.get("text") or content.get("result"))
    return ""


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return ""
    if isinstance(part.get("text"), str):  # what was said aloud
        return str(part["text"])
    kind = part.get("content_type")
    if kind == "image_asset_pointer":
        return "[a picture]"
    return f"[{line(kind)}]" if isinstance(kind, str) else ""


def _fenced(text: str, language: str) -> str:
    if not text.strip():
        return ""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _thought(message: Mapping[str, Any]) -> str:
    content = _dict(message.get("content"))
    thoughts = content.get("thoughts")
    if content.get("content_type") != "thoughts" or not isinstance(thoughts, list):
        return ""
    parts = []
    for one in thoughts:
        told = _dict(one)
        parts += [part for name in ("summary", "content") if (part := _str(told.get(name)))]
    return "\n\n".join(parts)


def _with_thoughts(
    node: Node,
    mapping: Mapping[str, Any],
    thoughts: Mapping[str, str],
    skipped: Mapping[str, str | None],
) -> Node:
    """The answer with the thoughts that stand between it and the message before it."""
    if node.role != "assistant" or not thoughts:
        return node
    found: list[str] = []
    key, seen = node.parent, set[str]()
    while key is not None and key in skipped and key not in seen:
        seen.add(key)
        if key in thoughts:
            found.append(thoughts[key])
        key = skipped[key]
    if not found:
        return node
    return Node(
        node.key,
        node.parent,
        node.role,
        node.content,
        "\n\n".join(reversed(found)),
        node.created,
        model=node.model,
        extra=node.extra,
    )


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _str(value: Any) -> str:
    return value if isinstance(value, str) else ""
