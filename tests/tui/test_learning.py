from __future__ import annotations

import json

import pytest

from localllm.errors import StoreError
from localllm.tui import learning
from localllm.tui.screens.learning import rate, teach
from localllm.tui.store import Store

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


@pytest.fixture
def store():
    with Store(":memory:") as opened:
        yield opened


def asked(store: Store, *answers: str) -> tuple[int, list[int]]:
    """A chat with one question and these answers to it; its number and theirs."""
    chat = store.new_chat(system="Be brief.")
    question = store.add_message(chat.id, None, "user", "Why?")
    return chat.id, [
        store.add_message(chat.id, question.id, "assistant", text).id for text in answers
    ]


class TestRating:
    def test_opposite_ratings_of_siblings_are_a_pair(self, store):
        chat, (one, two, three) = asked(store, "Good.", "Bad.", "Fair.")
        assert rate(store, one, 1) == 0
        assert rate(store, two, -1) == 1
        assert rate(store, three, -1) == 1
        found = store.pairs()
        assert [(p.chosen, p.rejected) for p in found] == [("Good.", "Bad."), ("Good.", "Fair.")]
        assert list(found[0].prompt) == PROMPT
        assert {p.origin for p in found} == {"rating"}
        assert {p.chat for p in found} == {chat}

    def test_the_same_rating_again_takes_it_back(self, store):
        _, (one,) = asked(store, "Good.")
        rate(store, one, 1)
        rate(store, one, 1)
        assert store.message(one).rating == 0

    def test_a_pair_is_kept_once(self, store):
        _, (one, two) = asked(store, "Good.", "Bad.")
        rate(store, one, 1)
        rate(store, two, -1)
        rate(store, two, -1)
        assert rate(store, two, -1) == 0
        assert len(store.pairs()) == 1

    def test_questions_are_not_rated(self, store):
        chat, _ = asked(store, "Good.")
        question = store.tree(chat)[0]
        rate(store, question.id, 1)
        assert store.message(question.id).rating == 0


class TestTeaching:
    def test_a_better_answer_is_a_sibling_an_example_and_a_pair(self, store):
        chat, (one,) = asked(store, "Wrong.")
        sibling = teach(store, one, "Right.")
        assert sibling is not None
        assert store.chat(chat).head == sibling.id
        assert store.message(one).content == "Wrong."
        assert [(p.chosen, p.rejected, p.origin) for p in store.pairs()] == [
            ("Right.", None, "edit"),
            ("Right.", "Wrong.", "edit"),
        ]

    @pytest.mark.parametrize("same", ["Wrong.", " Wrong.\n", "  "])
    def test_nothing_changed_is_nothing_learned(self, store, same):
        _, (one,) = asked(store, "Wrong.")
        assert teach(store, one, same) is None
        assert store.pairs() == []


class TestFiles:
    def test_pairs_and_examples_are_what_finetune_reads(self, store, tmp_path):
        store.add_pair(PROMPT, "Good.", "Bad.", "rating")
        store.add_pair(PROMPT, "Better.", None, "edit")
        assert learning.export(store.pairs(), tmp_path / "new") == {
            "pairs.jsonl": 1,
            "examples.jsonl": 2,
        }
        (pair,) = map(json.loads, (tmp_path / "new" / "pairs.jsonl").read_text().splitlines())
        assert pair == {
            "prompt": PROMPT,
            "chosen": [{"role": "assistant", "content": "Good."}],
            "rejected": [{"role": "assistant", "content": "Bad."}],
        }
        lines = (tmp_path / "new" / "examples.jsonl").read_text().splitlines()
        assert [json.loads(line)["messages"][-1]["content"] for line in lines] == [
            "Good.",
            "Better.",
        ]

    def test_a_good_answer_in_several_pairs_is_one_example(self, store):
        store.add_pair(PROMPT, "Good.", "Bad.", "rating")
        store.add_pair(PROMPT, "Good.", "Worse.", "compare")
        assert len(list(learning.examples(store.pairs()))) == 1

    def test_nothing_to_write_writes_nothing(self, tmp_path):
        assert learning.export([], tmp_path) == {}
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_written_is_told(self, store, tmp_path):
        store.add_pair(PROMPT, "Good.", "Bad.", "rating")
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="cannot be written"):
            learning.export(store.pairs(), tmp_path / "file" / "folder")

    def test_doubles_are_found_whatever_their_spaces_and_case(self, store):
        store.add_pair(PROMPT, "Good answer.", "Bad.", "rating")
        store.add_pair(PROMPT, "good  answer.", "bad.", "compare")
        store.add_pair(PROMPT, "Good answer.", None, "edit")
        first, second, _ = store.pairs()
        assert learning.doubles(store.pairs()) == [second.id]
        assert first.id not in learning.doubles(store.pairs())
