"""Chats from files into the store, each whole or not at all, and none twice."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localllm.tui.exchange.reading import read_chats
from localllm.tui.exchange.trees import OF_OTHERS, ChatTree, Node, paths_of, tree_of
from localllm.tui.store import Store
from localllm.tui.store.records import Role


@dataclass(frozen=True)
class Imported:
    """chats: numbers of the new ones. known: how many were there already. wrong: what could not be
    read, in words."""

    form: str
    chats: tuple[int, ...]
    known: int
    wrong: tuple[str, ...] = ()


async def import_file(store: Store, path: Path) -> Imported:
    """Raises InvalidRequest for a file that cannot be read. The app goes on meanwhile."""
    found = await asyncio.to_thread(read_chats, path)
    new: list[int] = []
    known = 0
    for chat in put_in(store, found.chats):
        if chat is None:
            known += 1
        else:
            new.append(chat)
        await asyncio.sleep(0)
    return Imported(found.form, tuple(new), known, found.wrong)


def put_in(store: Store, trees: Iterable[ChatTree]) -> Iterator[int | None]:
    """For each tree the number of its new chat; None where some chat says all of it already, be it
    from an earlier import or this program's own."""
    begins: dict[bytes, list[int]] = {}
    for chat, role, content in store.first_messages():
        begins.setdefault(_begin(role, content), []).append(chat)
    for tree in trees:
        first = _begin(tree.nodes[0].role, tree.nodes[0].content) if tree.nodes else b""
        own = paths_of(tree)
        if any(own <= _paths(store, chat) for chat in begins.get(first, ())):
            yield None
            continue
        number = _put(store, tree)
        if tree.nodes:
            begins.setdefault(first, []).append(number)
        yield number


def _with_numbers(node: Node, numbers: Mapping[str | None, int | None]) -> dict[str, Any]:
    """What it carries, other messages by the numbers that they have here."""
    extra = dict(node.extra)
    for name in OF_OTHERS:
        if name in extra and (number := numbers.get(str(extra.pop(name)))) is not None:
            extra[name] = number
    return extra


def _begin(role: str, content: str) -> bytes:
    return hashlib.sha256(f"{role} {content}".encode()).digest()


def _paths(store: Store, chat: int) -> frozenset[bytes]:
    try:
        return paths_of(tree_of(store, chat))
    except KeyError:  # deleted meanwhile
        return frozenset()


def _put(store: Store, tree: ChatTree) -> int:
    times = [node.created for node in tree.nodes if node.created is not None]
    created = tree.created if tree.created is not None else min(times, default=time.time())
    numbers: dict[str | None, int | None] = {None: None}
    with store.together():
        chat = store.new_chat(
            model=tree.model,
            system=tree.system,
            created=created,
            title=tree.title,
            titled=1 if tree.title else 0,
            pinned=tree.pinned,
            params=tree.params,
            folder=tree.folder,
            adapter=tree.adapter,
            adapter_weight=tree.adapter_weight,
        )
        for node in tree.nodes:
            role: Role = node.role  # type: ignore[assignment]  # one of them, as was checked
            message = store.add_message(
                chat.id,
                numbers[node.parent],
                role,
                node.content,
                reasoning=node.reasoning,
                status=node.status,  # type: ignore[arg-type]
                model=node.model,
                adapter=node.adapter,
                params=node.params,
                receipt=node.receipt,
                extra=_with_numbers(node, numbers),
                created=created if node.created is None else node.created,
                open_branch=False,
            )
            numbers[node.key] = message.id
            if node.rating:
                store.edit_message(message.id, rating=node.rating)
        store.edit_chat(
            chat.id,
            head=numbers.get(tree.head) if tree.head is not None else None,
            updated=tree.updated if tree.updated is not None else max(times, default=created),
        )
        store.set_tags(chat.id, tree.tags)
    return chat.id
