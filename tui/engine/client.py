"""What the app knows of an engine: its state, answers in pieces, and a look inside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from localllm.errors import LocalLLMError

Json = Mapping[str, Any]
Phase = Literal["starting", "fetching", "loading", "ready", "dead"]


class EngineGone(LocalLLMError):
    """The engine's process has ended, or no model is loaded."""


@dataclass(frozen=True)
class ModelInfo:
    """What runs. note: what a user should know of how it was loaded, "" if nothing. sampling: the
    parameters that its makers recommend."""

    name: str
    backend: str = "cpu"
    context: int = 8192
    vocabulary: int = 0
    format: str = ""
    path: str = ""
    note: str = ""
    sampling: Json = field(default_factory=dict)


@dataclass(frozen=True)
class EngineState:
    """fraction: of what is being fetched, None where that is not known. error, hint: when dead."""

    phase: Phase = "starting"
    detail: str = ""
    fraction: float | None = None
    model: ModelInfo | None = None
    error: str | None = None
    hint: str | None = None


@dataclass(frozen=True)
class EngineEvents:
    """events: (class name, fields) as in `localllm.engine.events`, oldest first. dropped: lost."""

    events: tuple[tuple[str, Json], ...] = ()
    dropped: int = 0


News = EngineState | EngineEvents
Listener = Callable[[News], None]


@dataclass(frozen=True)
class TokenInfo:
    """drafted: "accepted" where speculation had guessed it, "rejected" for a guess that was wrong
    (it is no part of the answer), else "". top: (id, text, logprob), likeliest first.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()
    drafted: Literal["", "accepted", "rejected"] = ""


@dataclass(frozen=True)
class Piece:
    """What came since the last one. index: which of `n` answers."""

    index: int
    text: str = ""
    reasoning: str = ""
    tokens: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A function the model wants called. arguments: None where they are no JSON object; then `raw`
    is what was written."""

    name: str
    arguments: Json | None
    raw: str = ""


@dataclass(frozen=True)
class Finished:
    """reason: "stop", "length" or "cancelled"; receipt: `Receipt.to_dict()`."""

    reason: str
    receipt: Json = field(default_factory=dict)
    tool_calls: tuple[ToolCall, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Count:
    """Tokens of a conversation. total: with the template's own, up to where the answer begins.
    cached: of these, in the KV cache now. context: all that fits, the answer too.
    """

    total: int
    per_message: tuple[int, ...]
    cached: int
    context: int


@dataclass(frozen=True)
class KvBlock:
    """See `localllm.engine.kv_map`."""

    number: int
    group: int
    refcount: int
    owners: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class KvMap:
    blocks: tuple[KvBlock, ...]
    block_size: int


class Asked(Protocol):
    """Answers under way. Iterating gives pieces until all have ended; then `result` has each."""

    @property
    def result(self) -> Mapping[int, Finished]: ...

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    def stop(self) -> None:
        """Ends it soon, with what it has."""
        ...


class Engine(Protocol):
    """Every call may raise EngineGone, and what the library raises for the same."""

    @property
    def state(self) -> EngineState: ...

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener` in the app's thread with news; the result ends that."""
        ...

    async def open(self, model: str, **options: Any) -> None:
        """Loads a model, in place of the one before. options: as of `LLM`."""
        ...

    def ask(
        self,
        messages: Sequence[Json],
        params: Json,
        *,
        adapter: str | None = None,
        adapter_weight: float = 1.0,
        n: int = 1,
        tools: Sequence[Json] = (),
        continue_last: bool = False,
        logprobs: int = 0,
    ) -> Asked:
        """params: fields of SamplingParams beside the model's own. adapter: a name or a folder.

        continue_last: the last message is the assistant's, and the answer goes on with it.
        logprobs: alternatives told for each token, 0 for none.
        """
        ...

    async def count(self, messages: Sequence[Json], tools: Sequence[Json] = ()) -> Count:
        """tools: that are offered too; their description is part of the total alone."""
        ...

    async def tokens(self, text: str) -> int: ...

    async def kv_map(self) -> KvMap: ...

    async def block_text(self, block: int) -> str: ...

    async def load_adapter(self, path: str) -> str: ...

    async def unload_adapter(self, name: str) -> None: ...

    async def adapters(self) -> list[str]: ...

    async def restart(self) -> None:
        """After its death: the process again, with the model it had."""
        ...

    async def close(self) -> None: ...
