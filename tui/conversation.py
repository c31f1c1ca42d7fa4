"""From the store's tree to the messages a model is asked with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from localllm.tui.store import Chat, Message, Store


@dataclass(frozen=True)
class Question:
    """What an answer answers: its parent in the tree, and all that was said before it.

    messages: for Engine.ask, the system prompt first where there is one.
    """

    chat: Chat
    parent: Message
    messages: tuple[dict[str, Any], ...]


def question_of(store: Store, chat: Chat, message: int | None = None) -> Question | None:
    """The last question on the branch that ends with `message` (None: the open branch).

    An answer on the branch after it is left out: another one is to be given in its place. None
    where nothing was asked.
    """
    branch = store.branch(chat.head if message is None else message)
    while branch and branch[-1].role not in ("user", "tool"):
        branch.pop()
    if not branch:
        return None
    return Question(chat, branch[-1], tuple(asked(chat, branch)))


def asked(chat: Chat, branch: Sequence[Message]) -> list[dict[str, Any]]:
    """The branch as messages for the engine, after the chat's system prompt."""
    messages: list[dict[str, Any]] = []
    if chat.system and not any(message.role == "system" for message in branch):
        messages.append({"role": "system", "content": chat.system})
    for message in branch:
        told: dict[str, Any] = {"role": message.role, "content": message.content}
        for name in ("tool_calls", "tool_call_id", "name"):
            if name in message.extra:
                told[name] = message.extra[name]
        messages.append(told)
    return messages


def last_answer(store: Store, chat: Chat) -> Message | None:
    """The last answer on the open branch."""
    branch = store.branch(chat.head)
    return next((message for message in reversed(branch) if message.role == "assistant"), None)
