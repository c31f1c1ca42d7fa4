"""What the app was asked to begin with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Opening:
    """resume: the chat used last, or the one of that number. new: a new one, whatever the settings
    say. options: for Engine.open. params: of every chat, below its own. system, adapter: of the
    chat that opens; of those begun later too.
    """

    model: str | None = None
    resume: bool | int = False
    new: bool = False
    system: str | None = None
    adapter: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
