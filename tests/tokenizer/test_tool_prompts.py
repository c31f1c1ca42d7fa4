from __future__ import annotations

import json

import pytest

from localllm.errors import InvalidRequest, LocalLLMError
from localllm.sampling import Constraint, SamplingParams, Vocabulary, compile_constraint
from localllm.tokenizer.tool_calls import ToolCallParser
from localllm.tokenizer.tool_prompts import call_constraint, in_words, knows_tools, style_of

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
NOW = {"name": "now", "description": "The time."}


def test_templates_that_show_functions_are_known():
    assert knows_tools("{% if tools %}…{% endif %}")
    assert not knows_tools("{{ messages[0].content }}")
    assert not knows_tools(None)
    assert style_of("{% if tools %}<tool_call>") == "tags"
    assert style_of("{% if tools %}<|python_tag|>") == "parameters"
    assert style_of("{% if tools %}[TOOL_CALLS]") == "arguments"
    assert style_of("{{ messages }}") == "arguments"


def test_other_models_are_told_in_words():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    told = in_words(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "name": "add", "content": "2"},
        ],
        [ADD, NOW],
    )
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief.\n\nYou can call functions.")
    assert '"name": "now"' in told[0]["content"]
    assert json.loads(told[2]["content"]) == {"name": "add", "arguments": {"a": 1}}
    assert told[3]["content"] == "Result of add:\n2"
    assert in_words([{"role": "user", "content": "x"}], [])[0]["role"] == "user"


@pytest.mark.parametrize("style", ["tags", "parameters", "arguments"])
@pytest.mark.parametrize("choice", ["required", "add"])
def test_a_required_call_can_be_nothing_else(style, choice):
    constraint = compile_constraint(
        SamplingParams(**call_constraint([ADD, NOW], choice, style)), bytes_vocabulary()
    )
    assert constraint is not None
    key = "parameters" if style == "parameters" else "arguments"
    text = json.dumps({"name": "add", key: {"a": 1, "b": 2}})
    if style == "tags":
        text = f"<tool_call>\n{text}\n</tool_call>"
    wrong = constraint.fork()
    _write(constraint, text)
    assert constraint.satisfied
    parser = ToolCallParser(["add"])
    assert parser.feed(text) + parser.finish() == ""
    assert parser.calls[0].arguments == {"a": 1, "b": 2}
    with pytest.raises(LocalLLMError):
        _write(wrong, text.replace("add", "sub"))


def test_a_call_of_what_there_is_not_is_refused():
    with pytest.raises(InvalidRequest, match="'subtract'"):
        call_constraint([ADD], "subtract", "tags")
    with pytest.raises(InvalidRequest, match="no tools"):
        call_constraint([], "required", "tags")
    with pytest.raises(InvalidRequest, match="name"):
        call_constraint([{"type": "function"}], "required", "tags")


def _write(constraint: Constraint, text: str) -> None:
    for byte in text.encode():
        constraint.accept(byte)


def bytes_vocabulary() -> Vocabulary:
    tokens = [bytes([byte]) for byte in range(256)]
    return Vocabulary(
        [*tokens, b"<end>"], frozenset({256}), frozenset({256}), lambda t: list(t.encode())
    )
