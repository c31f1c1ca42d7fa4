"""A message that makes no sense is refused by its place and fault."""

from __future__ import annotations

from typing import Any

import pytest

from localllm.errors import InvalidRequest
from localllm.tokenizer.messages import check_messages, check_tools

GOOD = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "messages is empty"),
        ("hi", "messages must be a list"),
        ({"role": "user", "content": "hi"}, "messages must be a list"),
        ([GOOD, "hi"], r"messages\[1\] must be a dict, not str"),
        ([{"content": "hi"}], r"messages\[0\]: 'role' is missing"),
        ([{"role": 3, "content": "hi"}], r"messages\[0\]: 'role' must be a name, not 3"),
        ([{"role": " ", "content": "hi"}], r"messages\[0\]: 'role' must be a name"),
        ([GOOD, {"role": "user"}], r"messages\[1\] \(user\): 'content' is missing"),
        ([{"role": "user", "content": None}], r"messages\[0\] \(user\): 'content' is missing"),
        ([{"role": "user", "content": 5}], r"'content' must be text or a list .*, not int"),
        ([{"role": "user", "content": {"text": "a"}}], "must be text or a list .*, not dict"),
        ([{"role": "user", "content": b"hi"}], "must be text or a list .*, not bytes"),
        ([{"role": "user", "content": ["hi"]}], r"messages\[0\].content\[0\] \(user\) is no"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[0\] \(user\) is a part of type 'image_url'; only text",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].*'text' must be text"),
        ([GOOD, {"role": "user", "content": "a\udc00"}], r"messages\[1\].*lone surrogate U\+DC00"),
    ],
)
def test_faults_are_named_with_their_place(messages: Any, fault: str) -> None:
    with pytest.raises(InvalidRequest, match=fault):
        check_messages(messages)


def test_sound_messages_pass_with_all_their_fields() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]},
        {"role": "tool", "content": "12", "tool_call_id": "1"},
    ]
    assert check_messages(messages) == messages


def test_a_call_of_tools_needs_no_content_at_all() -> None:
    (message,) = check_messages([{"role": "assistant", "tool_calls": [{"function": {}}]}])
    assert message["content"] is None


def test_tools_must_be_schemas() -> None:
    assert check_tools(None) is check_tools([]) is None
    with pytest.raises(InvalidRequest, match=r"tools\[1\] must be a dict, not function"):
        check_tools([{}, lambda: 0])  # type: ignore[list-item]


def test_the_messages_given_are_left_as_they_are() -> None:
    given = {"role": "user", "content": "hi"}
    (taken,) = check_messages([given])
    taken["content"] = "changed"
    assert given["content"] == "hi"
