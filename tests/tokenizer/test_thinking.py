"""A model's thinking is told from its answer, however the text is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.tokenizer.thinking import ThinkingSplitter


def split(text: str, cuts: list[int], prompt_end: str = "") -> tuple[str, str]:
    splitter = ThinkingSplitter(prompt_end)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    parts = [splitter.feed(text[a:b]) for a, b in pairwise(places)] + [splitter.finish()]
    return "".join(a for a, _ in parts), "".join(b for _, b in parts)


CASES = [
    ("", "plain answer", "plain answer", ""),
    ("", "<think>\nso\n</think>\n\nanswer", "answer", "so\n"),
    ("", "\n<think>a</think>b <think>c</think>", "b <think>c</think>", "a"),
    ("", "1 < 2 <think>no</think>", "1 < 2 <think>no</think>", ""),
    ("", "<think>never ends", "", "never ends"),
    ("", "<thin", "<thin", ""),
    ("<assistant>\n<think>\n", "so\n</think>\nanswer", "answer", "so\n"),
    ("", "<|START_THINKING|>a<|END_THINKING|>b", "b", "a"),
]


@pytest.mark.parametrize(("prompt_end", "text", "answer", "thinking"), CASES)
@given(cuts=st.lists(st.integers(0, 100), max_size=8))
def test_thinking_and_answer(
    prompt_end: str, text: str, answer: str, thinking: str, cuts: list[int]
) -> None:
    assert split(text, cuts, prompt_end) == (answer, thinking)


@given(st.text(alphabet="<think>/ a\n", max_size=40), st.lists(st.integers(0, 100), max_size=8))
def test_the_way_text_is_cut_changes_nothing(text: str, cuts: list[int]) -> None:
    assert split(text, cuts) == split(text, [])
