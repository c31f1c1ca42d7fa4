"""Rows as data sets write them."""

from __future__ import annotations

from typing import Any

import pytest

from localllm.errors import InvalidRequest
from localllm.train.data.formats import Chat, Completion, Item, Pair, Text, item_of, kind_of

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def read(row: dict[str, Any]) -> Item:
    return item_of("d:1", row, kind_of("d:1", row))


def from_(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


@pytest.mark.parametrize(
    ("row", "item"),
    [
        ({"messages": [USER, ANSWER]}, Chat((USER, ANSWER))),
        ({"messages": '[{"role": "user", "content": "q"}]'}, Chat((USER,))),
        ({"conversations": [USER, ANSWER], "messages": None}, Chat((USER, ANSWER))),
        (
            {"conversations": [from_("human", "q"), from_("gpt", "a")], "id": "7"},
            Chat((USER, ANSWER)),
        ),
        (
            {"conversations": [from_("human", "q")], "system": "s"},
            Chat(({"role": "system", "content": "s"}, USER)),
        ),
        (
            {
                "conversations": [
                    from_("human", "q"),
                    from_("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                    from_("observation", "9"),
                ]
            },
            Chat((USER, CALLED, {"role": "tool", "content": "9"})),
        ),
        # As Parquet fills it up, and as the OpenAI API writes calls.
        (
            {
                "messages": [
                    {**USER, "tool_calls": None, "name": None},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
                    },
                    {**ANSWER, "tool_calls": []},
                ],
                "tools": '[{"type": "function"}]',
            },
            Chat(
                (USER, {**CALLED, "tool_calls": [{"function": CALL["function"]}]}, ANSWER),
                ({"type": "function"},),
            ),
        ),
        ({"prompt": "q", "completion": "a"}, Completion("q", "a")),
        ({"prompt": "q", "completion": '[{"x": 1}]'}, Completion("q", '[{"x": 1}]')),
        ({"instruction": "q", "input": "", "output": "a"}, Completion("q", "a")),
        ({"instruction": "q", "input": "more", "output": "a"}, Completion("q\n\nmore", "a")),
        (
            {"system": "s", "instruction": "q", "output": "a"},
            Chat(({"role": "system", "content": "s"}, USER, ANSWER), prompt=2),
        ),
        ({"prompt": [USER, ANSWER, USER], "completion": "b"},
         Chat((USER, ANSWER, USER, OTHER), prompt=3)),
        ({"text": "t", "meta": {"x": 1}}, Text("t")),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            Pair(Completion("q", "a"), Completion("q", "b")),
        ),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
            Pair(Chat((USER, ANSWER), prompt=1), Chat((USER, OTHER), prompt=1)),
        ),
        # The prompt may be repeated in both answers, or be there alone.
        (
            {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            Pair(Chat((USER, ANSWER), prompt=1), Chat((USER, OTHER), prompt=1)),
        ),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            Pair(Chat((USER, ANSWER), prompt=1), Chat((USER, OTHER), prompt=1)),
        ),
        (
            {
                "chosen": "\n\nHuman: q\n\nAssistant: a",
                "rejected": "\n\nHuman: q\n\nAssistant: b",
            },
            Pair(Chat((USER, ANSWER), prompt=1), Chat((USER, OTHER), prompt=1)),
        ),
    ],
)  # fmt: skip
def test_every_way_to_write_a_row_is_read(row: dict[str, Any], item: Item) -> None:
    assert read(row) == item


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no fields"),
        ({"a": 1, "b": 2}, "a row with 'a', 'b' is of no known format"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [3]}, "message 1 of 'messages' is no object"),
        (
            {"messages": [USER, {"role": "user"}]},
            r"message 2 of 'messages' \(user\) has no content",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "the content must be text, not int"),
        ({"messages": [{"role": "", "content": "x"}]}, "has no role"),
        ({"messages": [{**ANSWER, "tool_calls": "x"}]}, "'tool_calls' must be a list"),
        ({"messages": [{**ANSWER, "tool_calls": [{}]}]}, "call 1 of 'tool_calls' has no name"),
        (
            {"messages": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": "x"}]}]},
            "arguments of call 1",
        ),
        ({"messages": [USER], "tools": "{"}, "'tools' must be a list of objects"),
        ({"conversations": [{"from": "human"}]}, "'value' must be text"),
        ({"conversations": [from_("function_call", "f()")]}, "is no JSON with a name"),
        ({"chosen": "a", "rejected": "b"}, "no 'prompt'"),
        ({"chosen": [USER], "rejected": [USER]}, "must end with a message of the assistant"),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, USER, ANSWER]},
            "differ in their last message alone",
        ),
        ({"prompt": "q", "completion": "a", "messages": [USER]}, "prompt-completion or chat"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "text": "t"},
            "preference or text",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        read(row)
    assert str(error.value).startswith("d:1: ")


def test_a_choice_settles_what_could_be_two_things() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "messages": [USER, ANSWER]}
    with pytest.raises(InvalidRequest) as error:
        kind_of("d:1", row)
    assert "--kind" in (error.value.hint or "")
    assert item_of("d:1", row, "chat") == Chat((USER, ANSWER))
    assert isinstance(item_of("d:1", row, "preference"), Pair)
