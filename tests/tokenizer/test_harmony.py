"""What a gpt-oss model writes, channel by channel, however it is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.tokenizer.harmony import HarmonySplitter
from localllm.tokenizer.tool_calls import ToolCall


def split(text: str, cuts: list[int], continued: bool = False) -> tuple[str, str, list[ToolCall]]:
    splitter = HarmonySplitter(continued=continued)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    parts = [splitter.feed(text[a:b]) for a, b in pairwise(places)] + [splitter.finish()]
    return "".join(a for a, _ in parts), "".join(b for _, b in parts), splitter.calls


ADD = ToolCall("add", {"a": 1}, '{"a": 1}')
CASES = [
    (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>42",
        ("42", "Hm.", []),
    ),
    ("<|channel|>final<|message|>a < b <|x|><|return|>", ("a < b <|x|>", "", [])),
    (
        "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>',
        ("", "Add.", [ADD]),
    ),
    (
        ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}',
        ("", "", [ADD]),
    ),
    (
        '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 1}',
        ("", "", [ADD]),
    ),
    (
        "<|channel|>commentary<|message|>First I look.<|end|><|start|>assistant<|channel|>final"
        "<|message|>Done.",
        ("First I look.Done.", "", []),
    ),
    ("<|channel|>analysis<|message|>never ends", ("", "never ends", [])),
    ("<|channel|>ana", ("", "", [])),
    ("plain text", ("plain text", "", [])),
    (
        "<|channel|>commentary to=functions.add<|message|>{x",
        ("", "", [ToolCall("add", None, "{x")]),
    ),
]


@pytest.mark.parametrize(("text", "found"), CASES)
@given(cuts=st.lists(st.integers(0, 300), max_size=10))
def test_channels_are_told_apart(text, found, cuts):
    assert split(text, cuts) == found


def test_a_continued_answer_goes_on_as_one():
    assert split(" and more<|return|>", [3], continued=True) == (" and more", "", [])


MARKS = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "final", "analysis"]
MORE = ["assistant", " to=functions.f ", "{}", "<", "<|", "|>", " ", "word"]


@given(
    st.lists(st.sampled_from([*MARKS, *MORE]), max_size=12),
    st.lists(st.integers(0, 200), max_size=8),
)
def test_the_way_text_is_cut_changes_nothing(pieces, cuts):
    text = "<|channel|>" + "".join(pieces)
    assert split(text, cuts) == split(text, [])
