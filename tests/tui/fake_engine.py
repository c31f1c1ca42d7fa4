"""An engine without a model: it answers from a script, and plays recorded events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from localllm.errors import InvalidRequest
from localllm.tui.engine.client import (
    Count,
    EngineEvents,
    EngineGone,
    EngineState,
    Finished,
    KvBlock,
    KvMap,
    ModelInfo,
    Piece,
    TokenInfo,
    ToolCall,
)

RECEIPT: dict[str, Any] = {
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


class Request:
    """What the engine was asked."""

    def __init__(self, messages: Sequence[Any], params: Mapping[str, Any], **more: Any) -> None:
        self.messages = [dict(message) for message in messages]
        self.params = dict(params)
        self.adapter: str | None = more.get("adapter")
        self.adapter_weight: float = more.get("adapter_weight", 1.0)
        self.n: int = max(more.get("n", 1), self.params.get("n", 1))
        self.tools = list(more.get("tools", ()))
        self.continue_last: bool = more.get("continue_last", False)
        self.logprobs: int = more.get("logprobs", 0)


def _info(model: str) -> ModelInfo:
    return ModelInfo(model, vocabulary=49152)


# What it says: a text, or a text with calls. Given a list, one after the other, the last for good.
Answer = str | tuple[str, Sequence[ToolCall]]
Script = Answer | Sequence[Answer] | Callable[[Request], Answer]


def echo(request: Request) -> str:
    """An answer that tells what it was asked with."""
    params = request.params
    return (
        f"Answer at {params.get('temperature', 1)} seed {params.get('seed')} "
        f"with {request.adapter} to [b]{request.messages[-1]['content']}[/b]"
    )


class FakeAsked:
    """Words as tokens; of every fourth one another was likelier. Of `n` answers all say the same,
    the later ones with their number."""

    def __init__(self, engine: FakeEngine, request: Request, answer: Answer) -> None:
        self._engine, self._request = engine, request
        self._text, self._calls = (answer, ()) if isinstance(answer, str) else answer
        self._stopped = False
        self.result: dict[int, Finished] = {}

    def stop(self) -> None:
        self._stopped = True

    async def __aiter__(self) -> AsyncIterator[Piece]:
        engine, request = self._engine, self._request
        if engine.fails is not None:
            raise engine.fails
        for word in engine.thinks.split():
            await asyncio.sleep(engine.delay)
            yield Piece(0, "", f"{word} ")
        said = 0
        for place, word in enumerate(self._text.split(" ") if self._text else ()):
            await asyncio.sleep(engine.delay)
            if engine.state.phase == "dead":
                raise EngineGone(engine.state.error or "the engine has ended")
            if self._stopped or said == request.params.get("max_tokens"):
                break
            said += 1
            text = f" {word}" if place else word
            for index in range(request.n):
                own = text if place or not index else f"{index + 1}: {text}"
                yield Piece(index, own, "", (_token(place, own, request.logprobs),))
        seed = request.params.get("seed", 7)
        receipt = {**RECEIPT, "seed": seed, "adapter": request.adapter, "generated_tokens": said}
        calls = () if self._stopped else tuple(self._calls)
        reason = "cancelled" if self._stopped else "stop"
        self.result = {
            index: Finished(reason, receipt, calls, seed + index) for index in range(request.n)
        }


def _token(place: int, text: str, logprobs: int) -> TokenInfo:
    own, other = (place, text, -0.3), (1000 + place, " other", -1.6)
    if place % 4 == 3:
        own, other = (place, text, -1.5), (1000 + place, " [likelier]", -0.4)
    top = sorted((own, other), key=lambda one: -one[2])[:logprobs]
    return TokenInfo(place, text, own[2] if logprobs else None, tuple(top))


class FakeEngine:
    """script: what it answers. delay: seconds between two words. thinks: before each answer. fails:
    what asking raises. model: None for one that is not loaded yet. asks: all it was asked."""

    def __init__(
        self,
        script: Script = "A short answer.",
        *,
        delay: float = 0.0,
        thinks: str = "",
        fails: Exception | None = None,
        blocks: Sequence[KvBlock] = (),
        model: str | None = "smollm2:135m",
    ) -> None:
        self.state = EngineState() if model is None else EngineState("ready", model=_info(model))
        self.script = script
        self.delay = delay
        self.thinks = thinks
        self.fails = fails
        self.asks: list[Request] = []
        self.opened: list[str] = []
        self.loaded: list[str] = []
        self.blocks = tuple(blocks)
        self._listeners: list[Callable[[Any], None]] = []

    async def open(self, model: str, **options: Any) -> None:
        if model.startswith("no"):
            raise InvalidRequest(f"there is no model {model}", hint="choose another one")
        self.opened.append(model)
        self.tell(EngineState("ready", model=_info(model)))

    def subscribe(self, listener: Callable[[Any], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def ask(self, messages: Sequence[Any], params: Mapping[str, Any], **more: Any) -> FakeAsked:
        request = Request(messages, params, **more)
        self.asks.append(request)
        if callable(self.script):
            return FakeAsked(self, request, self.script(request))
        if isinstance(self.script, list):
            return FakeAsked(self, request, self.script[min(len(self.asks), len(self.script)) - 1])
        return FakeAsked(self, request, self.script)  # type: ignore[arg-type]

    async def count(self, messages: Sequence[Any], tools: Sequence[Any] = ()) -> Count:
        own = tuple(len(str(message.get("content") or "")) // 4 + 4 for message in messages)
        return Count(sum(own) + 20 * len(tools), own, sum(own) // 2, 8192)

    async def tokens(self, text: str) -> int:
        return len(text) // 4

    async def kv_map(self) -> KvMap:
        return KvMap(self.blocks, 16)

    async def block_text(self, block: int) -> str:
        return f"the text of [b]block[/b] {block}"

    async def load_adapter(self, path: str) -> str:
        if "missing" in path:
            raise InvalidRequest(f"there is no adapter in {path}")
        self.loaded.append(path)
        return Path(path).name

    async def unload_adapter(self, name: str) -> None:
        self.loaded = [path for path in self.loaded if Path(path).name != name]

    async def adapters(self) -> list[str]:
        return [Path(path).name for path in self.loaded]

    async def restart(self) -> None:
        self.tell(EngineState("ready", model=_info("smollm2:135m")))

    async def close(self) -> None:
        pass

    # ---- for tests

    def tell(self, news: EngineState | EngineEvents) -> None:
        if isinstance(news, EngineState):
            self.state = news
        for listener in list(self._listeners):
            listener(news)

    def die(self, why: str = "the engine was ended by SIGKILL") -> None:
        hint = "/restart starts it again"
        self.tell(replace(self.state, phase="dead", model=None, error=why, hint=hint))

    def play(self, path: Path) -> None:
        """Tells the events of a recorded file: a JSON list [class name, fields] a line."""
        lines = path.read_text("utf-8").splitlines()
        self.tell(EngineEvents(tuple((name, fields) for name, fields in map(json.loads, lines))))
