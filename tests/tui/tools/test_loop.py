from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from localllm.tui.engine.client import EngineGone, Piece, ToolCall
from localllm.tui.engine.remote import RemoteEngine
from localllm.tui.tools import Call, Called, Tool, ToolLoop, Turn
from localllm.tui.tools.calculator import CALCULATOR
from localllm.tui.tools.tool import MOST_RESULT
from tests.tui.conftest import SharedEngine
from tests.tui.fake_engine import FakeEngine

QUESTION = [{"role": "user", "content": "What is 6 * 7?"}]
WANTS = ("Let me see.", [ToolCall("calculator", {"expression": "6 * 7"})])


def tool(name: str, answer: Callable[[], Any], schema: dict[str, Any] | None = None) -> Tool:
    async def call(arguments: Any) -> str:
        found = answer()
        return await found if asyncio.iscoroutine(found) else found

    return Tool(name, "", schema or {}, call)


class Asker:
    """Answers for the person, and remembers what was asked."""

    def __init__(self, allow: bool = True) -> None:
        self.allow = allow
        self.calls: list[Call] = []

    async def __call__(self, call: Call) -> bool:
        self.calls.append(call)
        return self.allow


def run(loop: ToolLoop, messages=QUESTION, params=None, stop_at: str = "", **options):
    async def whole():
        steps = []
        async for step in loop.run(messages, params or {}, **options):
            steps.append(step)
            if stop_at and type(step).__name__ == stop_at:
                loop.stop()
        return steps

    return asyncio.run(whole())


def outcomes(steps) -> list[tuple[str, str]]:
    return [(s.outcome.state, s.outcome.text) for s in steps if isinstance(s, Called) and s.outcome]


def test_a_call_is_made_and_its_result_told():
    engine, ask = FakeEngine([WANTS, "It is 42."]), Asker()
    steps = run(ToolLoop(engine, [CALCULATOR], ask))
    kinds = [type(step).__name__ for step in steps if not isinstance(step, Piece)]
    assert kinds == ["Turn", "Called", "Called", "Turn"]
    assert outcomes(steps) == [("done", "42")]
    assert [step.content for step in steps if isinstance(step, Turn)] == [
        "Let me see.",
        "It is 42.",
    ]
    assert ask.calls == []  # it is harmless
    told = engine.asks[1].messages
    assert [message["role"] for message in told] == ["user", "assistant", "tool"]
    (call,) = told[1]["tool_calls"]
    assert call["function"] == {"name": "calculator", "arguments": {"expression": "6 * 7"}}
    assert told[2] == {
        "role": "tool",
        "tool_call_id": call["id"],
        "name": "calculator",
        "content": "42",
    }
    assert call["id"].isalnum()
    assert len(call["id"]) == 9
    assert engine.asks[0].tools == [CALCULATOR.schema]


def test_the_person_may_refuse_and_the_model_is_told():
    def never() -> str:
        raise AssertionError("it was called")

    engine, ask = FakeEngine([("", [ToolCall("wipe", {"all": True})]), "Fine."]), Asker(False)
    steps = run(ToolLoop(engine, [tool("wipe", never)], ask))
    assert outcomes(steps) == [("refused", "The user did not allow this call.")]
    assert [(call.name, call.arguments) for call in ask.calls] == [("wipe", {"all": True})]
    assert steps[-1].content == "Fine."


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (ToolCall("nothing", {}), "no function 'nothing'; there are: broken, srv__slow"),
        (ToolCall("", None, "{nonsense"), "could not be read"),
        (ToolCall("broken", {}), "Error: KeyError: 'x'"),
        (ToolCall("broken", {"y": 1}), "Error: there is no argument 'y'"),
    ],
)
def test_what_goes_wrong_is_told_to_the_model(call, why):
    def broken() -> str:
        raise KeyError("x")

    tools = [
        tool("broken", broken, {"additionalProperties": False}),
        tool("srv/slow", lambda: "x"),
    ]
    engine = FakeEngine([("", [call]), "Sorry."])
    steps = run(ToolLoop(engine, tools, Asker()))
    ((state, text),) = outcomes(steps)
    assert state == "failed"
    assert why in text
    assert steps[-1].content == "Sorry."


def test_rounds_are_bounded_and_the_last_one_has_no_tools():
    engine = FakeEngine(WANTS)
    steps = run(ToolLoop(engine, [CALCULATOR], Asker(), rounds=3))
    assert len(outcomes(steps)) == 3
    assert len(engine.asks) == 4
    choices = [ask.params.get("tool_choice") for ask in engine.asks]
    assert choices == [None, None, None, "none"]


def test_a_required_call_is_required_once():
    engine = FakeEngine([WANTS, "It is 42."])
    run(ToolLoop(engine, [CALCULATOR], Asker()), params={"tool_choice": "required", "seed": 3})
    assert [ask.params for ask in engine.asks] == [
        {"tool_choice": "required", "seed": 3},
        {"seed": 3},
    ]


def test_several_calls_of_one_answer_are_made_in_order():
    calls = [ToolCall("calculator", {"expression": text}) for text in ("1 + 1", "2 + 2")]
    engine = FakeEngine([("", calls), "Done."])
    steps = run(ToolLoop(engine, [CALCULATOR], Asker()))
    assert outcomes(steps) == [("done", "2"), ("done", "4")]
    assert [m["role"] for m in engine.asks[1].messages] == ["user", "assistant", "tool", "tool"]


def test_a_stop_ends_it_without_further_calls():
    def never() -> str:
        raise AssertionError("it was called")

    engine = FakeEngine(("One two three four", [ToolCall("wipe", {})]))
    steps = run(ToolLoop(engine, [tool("wipe", never)], Asker()), stop_at="Piece")
    turns = [step for step in steps if isinstance(step, Turn)]
    assert len(turns) == 1
    assert turns[0].finished.reason == "cancelled"
    assert len(turns[0].content) < len("One two three four")
    assert outcomes(steps) == []


def test_a_stop_ends_the_call_under_way_and_the_model_is_asked_no_more():
    engine = FakeEngine([("", [ToolCall("mute", {})]), "Never said."])
    loop = ToolLoop(engine, [tool("mute", lambda: asyncio.sleep(600))], Asker())

    async def whole() -> list[Any]:
        asyncio.get_running_loop().call_later(0.2, loop.stop)
        async with asyncio.timeout(20):
            return [step async for step in loop.run(QUESTION, {})]

    assert outcomes(asyncio.run(whole())) == [
        ("failed", "The user stopped this before there was a result.")
    ]
    assert len(engine.asks) == 1


@pytest.mark.parametrize(("context", "most"), [(8192, 8192), (1 << 20, MOST_RESULT)])
def test_a_result_is_bounded_by_the_context_too(context, most):
    engine = FakeEngine([("", [ToolCall("long", {})]), "Well."])
    assert engine.state.model is not None
    engine.state = replace(engine.state, model=replace(engine.state.model, context=context))
    steps = run(ToolLoop(engine, [tool("long", lambda: "x" * 10 * MOST_RESULT)], Asker()))
    left_out = 10 * MOST_RESULT - most
    assert outcomes(steps)[0][1] == f"{'x' * most}\n[{left_out:,} characters more were left out]"


def test_the_engines_death_ends_it():
    engine = FakeEngine(WANTS, delay=0.01)

    async def scenario() -> None:
        async for _ in ToolLoop(engine, [CALCULATOR], Asker()).run(QUESTION, {}):
            engine.die()

    with pytest.raises(EngineGone):
        asyncio.run(scenario())


def test_without_tools_it_is_a_plain_answer():
    engine = FakeEngine("Hello there.")
    steps = run(ToolLoop(engine, [], Asker()), adapter="poet", logprobs=1)
    assert "".join(step.text for step in steps if isinstance(step, Piece)) == "Hello there."
    assert (engine.asks[0].tools, engine.asks[0].adapter, engine.asks[0].logprobs) == (
        [],
        "poet",
        1,
    )


def test_the_real_model_is_made_to_call_and_answers(real_engine: SharedEngine):
    async def scenario(engine: RemoteEngine) -> list[Any]:
        loop = ToolLoop(engine, [CALCULATOR], Asker(), rounds=2)
        params = {"tool_choice": "required", "temperature": 0, "max_tokens": 60}
        return [step async for step in loop.run(QUESTION, params)]

    steps = real_engine.run(scenario)
    turns = [step for step in steps if isinstance(step, Turn)]
    assert turns[0].content == ""
    assert turns[0].calls[0].name == "calculator"
    assert set(turns[0].calls[0].arguments) == {"expression"}
    assert outcomes(steps)
    assert len(turns) > 1
