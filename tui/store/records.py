"""The rows of the store, as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["user", "assistant", "system", "tool"]
# writing: an answer under way; interrupted: the app ended before it did.
Status = Literal["complete", "writing", "stopped", "interrupted", "failed"]
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """updated, created: seconds since 1970. head: the last message of the open branch.

    titled: who gave the title: 0 nobody, 1 the user, 2 the model.
    """

    id: int
    title: str
    titled: int
    created: float
    updated: float
    pinned: bool
    model: str | None
    system: str
    params: Json
    head: int | None
    folder: str = ""
    adapter: str | None = None
    adapter_weight: float = 1.0
    draft: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Message:
    """A node of a chat's tree. rating: -1, 0 or 1."""

    id: int
    chat: int
    parent: int | None
    role: Role
    content: str
    reasoning: str
    created: float
    status: Status
    model: str | None
    adapter: str | None
    params: Json
    receipt: Json
    extra: Json
    rating: int = 0


@dataclass(frozen=True)
class Hit:
    """A message that holds what was searched for. excerpt: its words between \\x02 and \\x03."""

    chat: int
    message: int
    title: str
    role: Role
    excerpt: str
    created: float


@dataclass(frozen=True)
class Prompt:
    """kind: a system prompt, or a template of user messages with {{variables}}."""

    name: str
    kind: Literal["system", "user"]
    text: str


@dataclass(frozen=True)
class Preset:
    name: str
    params: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """What a person preferred. rejected: None for an answer that was written or mended by hand."""

    id: int
    created: float
    prompt: tuple[Json, ...]
    chosen: str
    rejected: str | None
    origin: Literal["rating", "edit", "compare"]
    chat: int | None
