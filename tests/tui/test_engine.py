"""The engine in a process of its own, with the real model."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from localllm.errors import InvalidRequest, ModelNotFound
from localllm.tui.engine.client import EngineEvents, EngineGone, EngineState, Piece
from localllm.tui.engine.remote import RemoteEngine
from tests.adapters.tiny import adapter_tensors, write_adapter
from tests.tiny_model import write_tiny_model
from tests.tui.conftest import SharedEngine

SEA = [{"role": "user", "content": "Write two sentences about the sea."}]
Scenario = Callable[[RemoteEngine], Awaitable[None]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it does not matter what is said."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=16_384)


def run(scenario: Scenario, command: list[str] | None = None) -> None:
    async def whole() -> None:
        engine = RemoteEngine(command)
        try:
            await asyncio.wait_for(scenario(engine), 60)
        finally:
            await engine.close()

    asyncio.run(whole())


async def answer(engine: RemoteEngine, messages: Any = SEA, **params: Any) -> str:
    options = {key: params.pop(key) for key in ("adapter", "continue_last") if key in params}
    asked = engine.ask(messages, {"max_tokens": 16, "temperature": 0, **params}, **options)
    return "".join([piece.text async for piece in asked])


def test_it_answers_counts_continues_and_shows_its_blocks(real_engine: SharedEngine) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        news: list[Any] = []
        engine.subscribe(news.append)
        assert engine.state.phase == "ready"
        assert engine.state.model is not None
        assert engine.state.model.context == 2048
        asked = engine.ask(SEA, {"max_tokens": 40, "temperature": 0}, logprobs=2)
        pieces = [piece async for piece in asked]
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        tokens = [token for token in tokens if token.drafted != "rejected"]
        assert "".join(token.text for token in tokens) == text
        assert all(len(token.top) == 2 and token.logprob is not None for token in tokens)
        assert asked.result[0].receipt["generated_tokens"] == len(tokens)
        # A prefix of the answer goes on as the answer did.
        start = [*SEA, {"role": "assistant", "content": text[: text.index(" ", 12)]}]
        more = await answer(engine, start, continue_last=True)
        assert text.startswith(start[-1]["content"] + more)
        count = await engine.count([*SEA, {"role": "assistant", "content": text}])
        assert sum(count.per_message) <= count.total
        assert 0 < count.cached <= count.total <= count.context == 2048
        offered = await engine.count([*SEA, {"role": "assistant", "content": text}], TOOLS)
        assert offered.per_message == count.per_message
        assert offered.total > count.total + 20  # the tools are described in the prompt
        assert await engine.tokens("the sea") == 2
        blocks = (await engine.kv_map()).blocks
        named = [block for block in blocks if block.name]
        assert "Write two sentences" in await engine.block_text(named[0].number)
        await asyncio.sleep(0.3)
        events = [name for one in news if isinstance(one, EngineEvents) for name, _ in one.events]
        assert {"Queued", "Started", "StepDone", "Ended"} <= set(events)

    real_engine.run(scenario)


def test_several_answers_share_a_batch_and_a_stopped_one_keeps_its_part(
    tiny_engine: SharedEngine,
) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        seen, tokens = ["", "", ""], [0, 0, 0]
        asked = engine.ask(SEA, {"temperature": 1.0, "ignore_eos": True, "max_tokens": 900}, n=3)
        other = asyncio.create_task(answer(engine))
        async for piece in asked:
            seen[piece.index] += piece.text
            tokens[piece.index] += len(piece.tokens)
            if min(tokens) > 10:
                asked.stop()
        assert {one.reason for one in asked.result.values()} == {"cancelled"}
        assert len(set(seen)) == 3
        assert await other == await answer(engine)

    tiny_engine.run(scenario)


def test_guesses_are_marked(real_engine: SharedEngine) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        text = "one two three four five six seven eight nine ten " * 3
        messages = [{"role": "user", "content": f"Repeat this:\n{text}"}]
        params = {"max_tokens": 60, "temperature": 0, "speculation": "ngram"}
        asked = engine.ask(messages, params)
        tokens = [token async for piece in asked for token in piece.tokens]
        receipt = asked.result[0].receipt
        accepted = [token for token in tokens if token.drafted == "accepted"]
        assert len(accepted) >= receipt["accepted_tokens"] > 0
        kept = [token for token in tokens if token.drafted != "rejected"]
        assert len(kept) == receipt["generated_tokens"]

    real_engine.run(scenario)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
]


def test_a_call_that_must_be_made_is_one_and_none_of_it_is_shown(real_engine: SharedEngine) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        messages = [{"role": "user", "content": "What is 17 + 25?"}]
        params = {"max_tokens": 60, "temperature": 0}
        asked = engine.ask(messages, {**params, "tool_choice": "required"}, tools=TOOLS)
        assert [piece.text async for piece in asked if piece.text] == []
        (call,) = asked.result[0].tool_calls
        assert call.name == "add"
        assert call.arguments is not None
        assert all(isinstance(value, int) for value in call.arguments.values())
        # Its result is told in the next round, to a template that knows no tools as well.
        function = {"name": call.name, "arguments": dict(call.arguments)}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
            {"role": "tool", "name": "add", "content": "42"},
        ]
        assert await answer(engine, messages)
        with pytest.raises(InvalidRequest, match="'subtract'"):
            async for _ in engine.ask(messages, {"tool_choice": "subtract"}, tools=TOOLS):
                pass

    real_engine.run(scenario)


def test_an_answer_that_is_stopped_at_once_ends_at_once(tiny_engine: SharedEngine) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        long = [{"role": "user", "content": "the sea " * 400}]
        asked = engine.ask(long, {"ignore_eos": True, "max_tokens": 800})
        await asyncio.sleep(0)  # it is on its way, its prompt is not made yet
        asked.stop()
        pieces = [piece async for piece in asked]
        assert sum(len(piece.tokens) for piece in pieces) < 100
        assert asked.result[0].reason == "cancelled"

    tiny_engine.run(scenario)


def test_a_wrong_name_costs_the_loaded_model_nothing(tiny_engine: SharedEngine) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        with pytest.raises(ModelNotFound):
            await engine.open("no-such-model")
        assert engine.state.phase == "ready"
        assert engine.state.model is not None
        assert engine.state.model.path == str(tiny_engine.model)
        assert await answer(engine)

    tiny_engine.run(scenario)


def test_an_adapter_is_added_in_part(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    shapes = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 32)}
    shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = (32, 4)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": ["q_proj"]}
    folder = str(write_adapter(tmp_path / "poet", config, adapter_tensors(shapes)))

    async def scenario(engine: RemoteEngine) -> None:
        await engine.open(str(model))
        assert await engine.load_adapter(folder) == await engine.load_adapter(folder) == "poet"

        async def said(weight: float) -> list[float]:
            params = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
            asked = engine.ask(SEA, params, adapter="poet", adapter_weight=weight, n=1, logprobs=1)
            tokens = [token async for piece in asked for token in piece.tokens]
            return [token.logprob or 0.0 for token in tokens if token.drafted != "rejected"]

        none, half, whole = [await said(weight) for weight in (0.0, 0.5, 1.0)]
        plain = engine.ask(SEA, {"max_tokens": 8, "temperature": 0, "ignore_eos": True}, logprobs=1)
        tokens = [token async for piece in plain for token in piece.tokens]
        assert [t.logprob for t in tokens if t.drafted != "rejected"] == none
        assert len({tuple(one) for one in (none, half, whole)}) == 3
        assert await engine.adapters() == ["poet"]
        await engine.unload_adapter("poet")
        assert await engine.adapters() == []

    run(scenario)


def test_what_is_wrong_is_told_by_its_kind_and_the_engine_lives_on(tiny: Path) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        with pytest.raises(EngineGone):
            await answer(engine)
        with pytest.raises(ModelNotFound) as missing:
            await engine.open("no-such-model")
        assert engine.state.phase == "dead"
        assert engine.state.error == str(missing.value)
        await engine.open(str(tiny), context=512)
        with pytest.raises(InvalidRequest, match="'temprature'"):
            await answer(engine, temprature=1)
        with pytest.raises(InvalidRequest, match="top_p"):
            await answer(engine, top_p=-3)
        with pytest.raises(Exception, match="no-such-folder"):
            await answer(engine, adapter="no-such-folder")
        assert await answer(engine)

    run(scenario)


def test_a_killed_engine_is_told_of_and_comes_back(tiny: Path) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        await engine.open(str(tiny), context=512)
        asked = engine.ask(SEA, {"ignore_eos": True, "max_tokens": 400})
        got: list[Piece] = []

        async def read() -> None:
            async for piece in asked:
                got.append(piece)
                assert engine.pid is not None
                os.kill(engine.pid, signal.SIGKILL)

        with pytest.raises(EngineGone, match="SIGKILL"):
            await read()
        assert got
        assert engine.state.phase == "dead"
        with pytest.raises(EngineGone, match="SIGKILL"):
            await engine.tokens("x")
        await engine.restart()
        assert await answer(engine)

    run(scenario)


def test_no_engine_outlives_its_app(tiny: Path) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        await engine.open(str(tiny), context=512)
        pid = engine.pid
        assert pid is not None
        engine.ask(SEA, {"ignore_eos": True, "max_tokens": 400})
        await asyncio.sleep(0.1)
        begun = time.monotonic()
        await engine.close()
        assert time.monotonic() - begun < 5
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    run(scenario)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import sys; sys.exit('no module named soup')", "exit code 1: no module named soup"),
        ("print('x' * 100); print('[1,2'); print('{}')", "exit code 0"),
    ],
)
def test_a_child_that_is_no_engine_ends_in_words(program: str, why: str) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        with pytest.raises(EngineGone, match=why):
            await engine.open("any")
        assert engine.state.phase == "dead"

    run(scenario, [sys.executable, "-c", program])


def test_a_message_beyond_all_bounds_is_refused_here(tiny_engine: SharedEngine) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        huge = [{"role": "user", "content": "x" * (33 << 20)}]
        with pytest.raises(InvalidRequest, match="more than the engine takes"):
            await answer(engine, huge)
        assert isinstance(engine.state, EngineState)
        assert engine.state.phase == "ready"

    tiny_engine.run(scenario)
