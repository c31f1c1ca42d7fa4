"""Voting, extraction and prompts are plain functions; self-consistency is a vote over a batch."""

from __future__ import annotations

import pytest

from localllm import LLM, SamplingParams
from localllm.errors import InvalidRequest
from localllm.reasoning import Vote, chain_of_thought, final_answer, self_consistency, vote
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with LLM(str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))) as model:
        yield model


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        (" \n.\n", None),
        ("5 and 6 make 11.", "11"),
        ("First 3, then 4.\nSo it is 7", "7"),
        ("The answer is 42, not 43.", "42"),
        ("The answer is 1. Wait: 2. So the answer is 3 apples, of 4.", "3"),
        ("**Answer:** $1,200.50", "1200.5"),
        ("The final answer is:\n\n18", "18"),
        ("16 - 7 = 9\n#### 9", "9"),
        (r"so \boxed{12}", "12"),
        ("The answer is Paris. It has 2 million people.", "paris"),
        ("Thinking 1, 2, 3.\nThe answer is (B).", "b"),
        ("Let us see.\nIt is Paris.\n", "it is paris"),
        ("The answer is:", "the answer is"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("it went from 5-3 to +007", "7"),
        ("0.50", "0.5"),
        ("-0", "0"),
        ("100", "100"),
        ("1,200.0", "1200"),
        ("a list: 1,2,3", "3"),
        ("about 50% of x2 and v1.5", "50"),
    ],
)
def test_the_final_answer_is_what_is_said_last_in_a_common_spelling(text, answer):
    assert final_answer(text) == answer


def test_the_majority_wins():
    texts = ["it is 4", "so 5", "the answer is 4", "nothing", "4.0"]
    decided = vote(texts)
    assert (decided.answer, decided.index) == ("4", 0)
    assert list(decided.counts.items()) == [("4", 3), ("5", 1), ("nothing", 1)]


def test_a_tie_goes_to_the_earliest():
    assert vote(["7", "8", "8", "7"]).answer == "7"
    assert vote(["8", "7", "7", "8"]) == Vote("8", 0, {"8": 2, "7": 2})


def test_texts_without_an_answer_do_not_vote():
    only_yes = lambda text: "yes" if "yes" in text else None  # noqa: E731
    decided = vote(["no", "no", "oh yes"], key=only_yes)
    assert (decided.answer, decided.index, decided.counts) == ("yes", 2, {"yes": 1})
    assert vote(["no"], key=only_yes) == Vote(None, None, {})
    assert vote([]) == Vote(None, None, {})


def test_chain_of_thought_asks_for_steps_or_shows_them():
    assert chain_of_thought("2 + 2?") == [
        {"role": "user", "content": "2 + 2?\nLet's think step by step."}
    ]
    assert chain_of_thought("2 + 2?", examples=[("1 + 1?", "One and one make 2.")]) == [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "One and one make 2."},
        {"role": "user", "content": "2 + 2?"},
    ]


def test_self_consistency_votes_over_seeded_answers(llm):
    params = SamplingParams(max_tokens=6, seed=2**64 - 3, ignore_eos=True)
    messages = chain_of_thought("2 + 2?")
    result = self_consistency(llm, messages, 6, params)
    assert [r.receipt.seed for r in result.results] == [*range(2**64 - 3, 2**64), 0, 1, 2]
    assert result.vote == vote([r.text for r in result.results])
    assert result.text == result.results[result.vote.index].text
    assert (result.answer, result.counts) == (result.vote.answer, result.vote.counts)
    alone = llm.chat(messages, SamplingParams(max_tokens=6, seed=1, ignore_eos=True))
    assert alone.text == result.results[4].text
    assert self_consistency(llm, messages, 6, params).counts == result.counts


def test_self_consistency_takes_text_and_ids_and_another_vote(llm):
    params = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    last = lambda texts: Vote(texts[-1], len(texts) - 1, {})  # noqa: E731
    for prompt in ("hello", llm.tokenizer.encode("hello")):
        result = self_consistency(llm, prompt, 3, params, vote=last)
        assert result.text == result.results[2].text
    nothing = self_consistency(llm, "hello", 3, params, vote=lambda _: Vote(None, None, {}))
    assert nothing.text == nothing.results[0].text
    assert nothing.answer is None


def test_answers_that_could_not_differ_are_refused(llm):
    greedy = SamplingParams(temperature=0, max_tokens=3)
    with pytest.raises(InvalidRequest, match="temperature 0"):
        self_consistency(llm, "hello", 2, greedy)
    assert len(self_consistency(llm, "hello", 1, greedy).results) == 1
    with pytest.raises(InvalidRequest, match="at least 1"):
        self_consistency(llm, "hello", 0)


def test_without_a_seed_the_answers_differ_from_call_to_call(llm):
    first, second = (self_consistency(llm, "hello", 2) for _ in range(2))
    assert first.results[0].receipt.seed != second.results[0].receipt.seed
    assert first.results[0].receipt.seed + 1 == first.results[1].receipt.seed
