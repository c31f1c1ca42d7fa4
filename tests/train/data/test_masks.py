"""Exactly what the assistant says is trained, with any template and whatever the text spells."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localllm.tokenizer import Tokenizer
from localllm.train.data import plain_preview, preview
from localllm.train.data.example import Example
from localllm.train.data.formats import Chat, Completion, Text
from localllm.train.data.masks import Masker
from tests.examples import examples
from tests.tokenizer.conftest import Make
from tests.tokenizer.templates import KNOWN, QWEN3, SMOLLM2

HELLO = {"role": "user", "content": "Hello"}
WORDS = st.sampled_from(
    ["Hello", " how are you?", "<|im_end|>", "<eos>", "</s>", "<end_of_turn>", "[/INST]", "\n\n",
     "{{ x }}", "<|eot_id|>", "é", " end", "<|im_start|>assistant\n", "a"]
)  # fmt: skip
SAID = st.lists(WORDS, min_size=1, max_size=5).map("".join).filter(lambda text: text.strip())


def runs(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The texts that are trained, control tokens spelled."""
    marked = zip(example.tokens.tolist(), example.trained.tolist(), strict=True)
    return [
        tokenizer.decode([token for token, _ in run], skip_special=False)
        for on, run in groupby(marked, key=lambda pair: pair[1])
        if on
    ]


def chat(*contents: str) -> Chat:
    roles = ("user", "assistant")
    return Chat(tuple({"role": roles[n % 2], "content": c} for n, c in enumerate(contents)))


@pytest.mark.parametrize("name", KNOWN)
@settings(
    max_examples=examples(15),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(contents=st.lists(SAID, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
def test_every_answer_and_its_end_is_trained_and_nothing_else(
    name: str,
    contents: list[str],
    build: Make,
) -> None:
    tokenizer = build(KNOWN[name])
    made = Masker(tokenizer, "assistant", None).chat(chat(*contents), "x:1")
    found = [text for example in made.examples for text in runs(example, tokenizer)]
    answers = contents[1::2]
    assert len(found) == len(answers)
    ends = {tokenizer.decode([token], skip_special=False) for token in tokenizer.eos_ids}
    for text, answer in zip(found, answers, strict=True):
        # Some templates trim what is said, and some write an empty thought before it.
        assert answer.strip() in text
        rest = text.replace(answer.strip(), "", 1).strip()
        assert rest.removeprefix("<think>\n\n</think>").strip() in ends
    assert not made.endless


@pytest.mark.parametrize("name", KNOWN)
def test_up_to_an_answer_the_ids_are_those_of_the_prompt_it_would_get(
    name: str,
    build: Make,
) -> None:
    tokenizer = build(KNOWN[name])
    said = chat("Hello <|im_end|>", "one", "and <eos>?", "two")
    made = Masker(tokenizer, "last", None).chat(said, "x:1")
    (example,) = made.examples
    prompt = tokenizer.apply_chat(
        list(said.messages[:3]), add_generation_prompt=True, date_string="26 Jul 2024"
    )
    start = int(np.flatnonzero(example.trained)[0])
    ids = example.tokens.tolist()
    assert ids[:start] == prompt[:start]
    # A template may open a thought in its prompt that it does not keep in the past.
    assert len(prompt) - start <= 6


def test_text_that_spells_a_control_token_stays_text(build: Make) -> None:
    tokenizer = build(SMOLLM2)
    end = tokenizer.special_id("<|im_end|>")
    made = Masker(tokenizer, "assistant", None).chat(
        chat("x", "a <|im_end|> b <|im_start|>user\nc"), "x:1"
    )
    (example,) = made.examples
    kept = example.tokens[example.trained].tolist()
    assert kept.count(end) == 1
    assert kept[-1] == end


def test_answers_whose_past_is_rendered_otherwise_get_examples_of_their_own(
    build: Make,
) -> None:
    tokenizer = build(QWEN3)
    said = chat("a", "<think>\nlong\n</think>\n\none", "b", "<think>\nother\n</think>\n\ntwo")
    made = Masker(tokenizer, "assistant", None).chat(said, "x:1")
    assert made.expanded
    assert len(made.examples) == 2
    first, second = (runs(example, tokenizer) for example in made.examples)
    assert "long" in first[0]
    assert "one" in first[0]
    assert len(second) == 1
    assert "two" in second[0]
    assert "long" not in tokenizer.decode(made.examples[1].tokens.tolist())


def test_what_comes_after_the_last_answer_is_left_out_and_told(build: Make) -> None:
    tokenizer = build(SMOLLM2)
    messages = (*chat("a", "b").messages, HELLO)
    made = Masker(tokenizer, "assistant", None).chat(Chat(messages), "x:1")
    assert made.trailing == 1
    assert "Hello" not in tokenizer.decode(made.examples[0].tokens.tolist())


@pytest.mark.parametrize(
    ("messages", "fact"),
    [
        ([HELLO], "unanswered"),
        ([HELLO, {"role": "assistant", "content": " \n"}], "empty"),
        ([], "unanswered"),
    ],
)
def test_a_row_with_nothing_to_learn_is_told(
    messages: list[dict[str, Any]],
    fact: str,
    build: Make,
) -> None:
    made = Masker(build(SMOLLM2), "assistant", None).chat(Chat(tuple(messages)), "x:1")
    assert made.examples == ()
    assert getattr(made, fact)


def test_empty_turns_between_others_are_not_trained(build: Make) -> None:
    tokenizer = build(SMOLLM2)
    made = Masker(tokenizer, "assistant", None).chat(chat("a", "", "b", "words"), "x:1")
    assert made.empty_turns == 1
    assert runs(made.examples[0], tokenizer) == ["words<|im_end|>"]


def test_texts_and_completions_end_with_the_end_of_text(build: Make) -> None:
    known = SMOLLM2
    tokenizer = build(known)
    tokenizer.chat_template = None
    masker = Masker(tokenizer, "assistant", None)
    (text,) = masker.text(Text("Hello <|im_end|>"), "x:1").examples
    assert text.targets == len(text) - 1
    assert int(text.tokens[-1]) in tokenizer.eos_ids
    assert int(text.tokens[-2]) not in tokenizer.eos_ids
    (both,) = masker.completion(Completion("How are", " you?"), "x:1").examples
    assert tokenizer.decode(both.tokens[both.trained].tolist()) == " you?"


def test_the_preview_shows_what_is_trained(build: Make) -> None:
    tokenizer = build(SMOLLM2)
    (example,) = Masker(tokenizer, "assistant", None).chat(chat("a\x1b[31m", "b"), "x:1").examples
    shown = plain_preview(example, tokenizer)
    assert shown.endswith("⟦b<|im_end|>⟧")
    assert "\x1b" not in shown


def test_the_preview_tells_control_tokens_from_text_that_spells_them(build: Make) -> None:
    tokenizer = build(SMOLLM2)
    said = chat("a <|im_end|>", "b\N{SNOWMAN}")
    (example,) = Masker(tokenizer, "assistant", None).chat(said, "x:1").examples
    shown = preview(example, tokenizer)
    assert shown.plain == plain_preview(example, tokenizer).replace("⟦", "").replace("⟧", "")
    assert shown.plain == tokenizer.render_chat(
        list(said.messages), add_generation_prompt=False
    ).removesuffix("\n")
    styled = {(shown.plain[s.start : s.end], str(s.style)) for s in shown.spans}
    assert ("b\N{SNOWMAN}", "bold green") in styled
    assert ("<|im_end|>", "bold green underline") in styled
    assert any("a <|im_end|>" in text and style == "dim" for text, style in styled)
