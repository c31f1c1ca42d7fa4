"""Calls are told from text, however it is cut into pieces, and no part of a call is shown."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from localllm.tokenizer.tool_calls import MOST_CALLS, MOST_CHARACTERS, ToolCall, ToolCallParser

KNOWN = ("add", "look_up")


def read(text: str, cuts: list[int] = [], known=KNOWN) -> tuple[str, list[ToolCall]]:  # noqa: B006
    parser = ToolCallParser(known)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    out = "".join(parser.feed(text[a:b]) for a, b in pairwise(places)) + parser.finish()
    return out, parser.calls


ADD = '{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}"}]}}'
GIVEN = {"a": 1, "b": [2, {"c": "}"}]}
CASES = [
    (f"<tool_call>\n{ADD}\n</tool_call>", "", 1),
    (f"Let me see.\n\n<tool_call>\n{ADD}\n</tool_call>\n<tool_call>{ADD}</tool_call>",
     "Let me see.", 2),
    (f"<tool_call>{ADD}", "", 1),  # the end was cut
    (f"<tool_call>{ADD}</tool_call> and more", " and more", 1),
    (f"[TOOL_CALLS][{ADD}, {ADD}]", "", 2),
    (f"[TOOL_CALLS] [{ADD}]", "", 1),
    ('[TOOL_CALLS]add[ARGS]{"a": 1, "b": [2, {"c": "}"}]}', "", 1),
    ('[TOOL_CALLS]add{"a": 1, "b": [2, {"c": "}"}]}', "", 1),
    ('[TOOL_CALLS]add[ARGS]{"a": 1, "b": [2, {"c": "}"}]}'
     '[TOOL_CALLS]add[ARGS]{"a": 1, "b": [2, {"c": "}"}]}', "", 2),
    (f"<|python_tag|>{ADD.replace('arguments', 'parameters')}", "", 1),
    (f"<|python_tag|>{ADD}; {ADD}", "", 2),
    (f"<|tool_call|>[{ADD}]<|/tool_call|>", "", 1),
    (ADD, "", 1),
    (f"\n{ADD}\n", "", 1),
    (f"```json\n{ADD}\n```", "", 1),
    (f"[{ADD}]", "", 1),
    (f"{ADD}\n{ADD}", "", 2),
    (json.dumps({"type": "function", "function": {"name": "add", "arguments": GIVEN}}), "", 1),
    (json.dumps({"name": "add", "arguments": json.dumps(GIVEN)}), "", 1),
    ("<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n"
     '[2, {"c": "}"}]\n</parameter>\n</function>\n</tool_call>', "", 1),
    ("<tool_call><function=add>" + json.dumps(GIVEN) + "</function></tool_call>", "", 1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown", "count"), CASES)
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_every_familys_form_is_read(text, shown, count, cuts):
    out, calls = read(text, cuts)
    assert out == shown
    assert [(call.name, call.arguments) for call in calls] == [("add", GIVEN)] * count


@pytest.mark.parametrize(
    "text",
    [
        "A plain answer.\n",
        "Use <tool> or [TOOL] here <",
        '{"name": "Anna", "arguments": {}}',  # no function of that name
        '{"title": "add"}',
        '{"name": "add", "arguments": {}} is how a call is written.',
        "```python\nprint(1)\n```",
        "[1, 2, 3]",
        '["name"]',
        "{}",
        "{",
        '[{"name": "add',
        "```",
        "  ",
    ],
)
@given(cuts=st.lists(st.integers(0, 100), max_size=8))
def test_what_is_no_call_is_shown_as_it_is(text, cuts):
    assert read(text, cuts) == (text, [])


def test_bare_json_is_text_where_there_are_no_functions():
    assert read(ADD, known=()) == (ADD, [])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("<tool_call>{broken</tool_call>", ""),
        ("<tool_call>never mind</tool_call>", ""),
        ('<tool_call>{"arguments": {}}</tool_call>', ""),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "add"),
        ("[TOOL_CALLS]add[ARGS]{'a': 1}", "add"),
        ('[TOOL_CALLS]add[ARGS]{"a": ', "add"),
        ("[TOOL_CALLS]", ""),
    ],
)
@given(cuts=st.lists(st.integers(0, 100), max_size=8))
def test_a_call_that_cannot_be_read_is_told_and_not_shown(text, name, cuts):
    out, calls = read(text, cuts)
    assert out == ""
    assert [(call.name, call.arguments) for call in calls] == [(name, None)]
    assert calls[0].raw or text == "[TOOL_CALLS]"


def test_a_closing_mark_in_a_string_ends_nothing():
    value = {"text": "a </tool_call> b"}
    text = "<tool_call>" + json.dumps({"name": "look_up", "arguments": value}) + "</tool_call>x"
    assert read(text) == ("x", read(text)[1])
    assert read(text)[1][0].arguments == value


def test_an_answer_is_shown_as_soon_as_it_can_be_no_call():
    parser = ToolCallParser(KNOWN)
    assert parser.feed('{"city": ') == '{"city":'
    parser = ToolCallParser(KNOWN)
    assert parser.feed("```py") == ""
    assert parser.feed("thon\nprint") == "```python\nprint"


def test_calls_are_bounded():
    out, calls = read("<tool_call>" + "x" * (MOST_CHARACTERS + 100))
    assert (out, len(calls)) == ("x" * 100, 1)
    assert len(read(f"<tool_call>{ADD}</tool_call>" * 50)[1]) == MOST_CALLS
    deep = "[TOOL_CALLS]" + "[" * 100_000
    assert read(deep)[1][0].arguments is None


PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
        *("<function=f>", "<parameter=a>", '{"name": "add", ', '"arguments": {}}', "{", "}"),
        *("[", "]", '"', "\\", ";", "```json\n", "```", " ", "\n", "add", "word", "<", "<tool"),
    ]
)


@given(st.lists(PIECES, max_size=14), st.lists(st.integers(0, 200), max_size=10))
@example(["<tool_call>", "<function=f>", "{", "</tool_call>"], [3])
def test_the_way_text_is_cut_changes_nothing(pieces, cuts):
    text = "".join(pieces)
    every = list(range(len(text)))
    assert read(text, cuts) == read(text) == read(text, every)


@given(st.text(max_size=60))
def test_text_without_marks_passes_unchanged(text):
    assert read(text) == (text, [])
