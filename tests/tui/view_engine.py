"""An engine that answers from a function: what the screens see of one, and what they asked it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from localllm.errors import InvalidRequest

RECEIPT: Mapping[str, Any] = {
    "backend": "cpu",
    "seed": 7,
    "adapter": None,
    "prompt_tokens": 120,
    "cached_tokens": 96,
    "cached_from_disk": 0,
    "cache_stop": "what follows was never computed",
    "generated_tokens": 40,
    "drafted_tokens": 12,
    "accepted_tokens": 9,
    "drafter": "ngram",
    "queue_time": 0.001,
    "time_to_first_token": 0.12,
    "total_time": 1.5,
    "prefill_tokens_per_second": 800.0,
    "decode_tokens_per_second": 61.2,
    "peak_kv_blocks": 5,
    "preemptions": 0,
    "stopped_by": "eos",
}


@dataclass(frozen=True)
class Request:
    messages: Sequence[Mapping[str, Any]]
    params: Mapping[str, Any]
    adapter: str | None
    weight: float
    logprobs: int


def echo(request: Request) -> str:
    """An answer that tells what it was asked with."""
    params = request.params
    return (
        f"Answer at {params.get('temperature', 1)} seed {params.get('seed')} "
        f"with {request.adapter} to [b]{request.messages[-1]['content']}[/b]"
    )


class Asked:
    """Words as tokens. Of every fourth one another was likelier."""

    def __init__(self, engine: ViewEngine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._stopped = False
        self.result: dict[int, Any] = {}

    def stop(self) -> None:
        self._stopped = True

    async def __aiter__(self) -> AsyncIterator[Any]:
        if self._engine.fails is not None:
            raise self._engine.fails
        words = self._engine.answer(self._request).split(" ")
        count = 0
        for number, word in enumerate(words):
            if self._stopped:
                break
            await asyncio.sleep(self._engine.delay)
            text = (" " if number else "") + word
            count += 1
            yield SimpleNamespace(
                index=0, text=text, reasoning="", tokens=(self._token(number, text),)
            )
        reason = "cancelled" if self._stopped else "eos"
        receipt = {
            **RECEIPT,
            "seed": self._request.params.get("seed", 7),
            "adapter": self._request.adapter,
            "generated_tokens": count,
        }
        self.result = {0: SimpleNamespace(reason=reason, receipt=receipt, tool_calls=(), seed=7)}

    def _token(self, number: int, text: str) -> Any:
        own, other = (number, text, -0.3), (1000 + number, " other", -1.6)
        if number % 4 == 3:
            own, other = (number, text, -1.5), (1000 + number, " [likelier]", -0.4)
        top = tuple(sorted((own, other), key=lambda one: -one[2])) if self._request.logprobs else ()
        return SimpleNamespace(id=number, text=text, logprob=own[2], top=top, drafted="")


@dataclass
class ViewEngine:
    """answer: the text for a request. delay: seconds between tokens. fails: what asking raises."""

    answer: Callable[[Request], str] = echo
    delay: float = 0.0
    fails: Exception | None = None
    blocks: Sequence[Any] = ()
    model: str | None = "smollm2:135m"
    requests: list[Request] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    listeners: list[Callable[[Any], None]] = field(default_factory=list)

    __hash__ = object.__hash__

    @property
    def state(self) -> Any:
        info = SimpleNamespace(name=self.model, context=8192, backend="cpu", vocabulary=49152)
        ready = self.model is not None
        return SimpleNamespace(
            phase="ready" if ready else "starting",
            detail="",
            fraction=None,
            model=info if ready else None,
            error=None,
            hint=None,
        )

    async def open(self, model: str, **options: Any) -> None:
        if model.startswith("no"):
            raise InvalidRequest(f"there is no model {model}", hint="choose another one")
        self.opened.append(model)
        self.model = model

    def subscribe(self, listener: Callable[[Any], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def tell(self, *events: Any) -> None:
        for listener in self.listeners:
            listener(SimpleNamespace(events=events, dropped=0))

    def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: Mapping[str, Any],
        *,
        adapter: str | None = None,
        adapter_weight: float = 1.0,
        n: int = 1,
        tools: Sequence[Any] = (),
        continue_last: bool = False,
        logprobs: int = 0,
    ) -> Asked:
        request = Request(messages, params, adapter, adapter_weight, logprobs)
        self.requests.append(request)
        return Asked(self, request)

    async def count(self, messages: Sequence[Mapping[str, Any]]) -> Any:
        each = tuple(len(str(message["content"])) // 4 for message in messages)
        return SimpleNamespace(
            total=sum(each), per_message=each, cached=min(32, sum(each)), context=8192
        )

    async def kv_map(self) -> Any:
        return SimpleNamespace(blocks=tuple(self.blocks))

    async def block_text(self, block: int) -> str:
        return f"the text of [b]block[/b] {block}"

    async def load_adapter(self, path: str) -> str:
        if "missing" in path:
            raise InvalidRequest(f"there is no adapter in {path}")
        self.loaded.append(path)
        return path

    async def unload_adapter(self, name: str) -> None:
        self.loaded.remove(name)

    async def adapters(self) -> list[str]:
        return list(self.loaded)
