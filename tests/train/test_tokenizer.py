"""A vocabulary of one's own: lossless, the same every time, and opened by our loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import InvalidRequest, TemplateError
from localllm.tokenizer import Tokenizer, load_tokenizer
from localllm.train.data import load_data
from localllm.train.data.texts import texts_of
from localllm.train.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXTS = [
    f"The lamp number {n} stood in a {'red' if n % 2 else 'blue'} room, and it's {n * 7} years old."
    for n in range(200)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("made") / "deep" / "er")


@given(st.text())
def test_every_text_comes_back(made: Tokenizer, text: str) -> None:
    assert made.decode(made.encode(text)) == text


def test_words_of_the_texts_are_few_tokens(made: Tokenizer) -> None:
    assert made.vocab_size == 400
    ids = made.encode(" The lamp number 7 stood in a red room.")
    assert len(ids) < len("The lamp number 7 stood in a red room.") / 2


def test_special_tokens_come_first_and_text_never_becomes_one(made: Tokenizer) -> None:
    assert [made.special_id(text) for text in SPECIAL_TOKENS] == [0, 1, 2]
    assert made.special_ids == {0, 1, 2}
    assert made.eos_ids == {0, 2}
    assert not made.special_ids & set(made.encode("<|im_end|><|endoftext|>"))
    ids = made.apply_chat([{"role": "user", "content": "a <|im_end|>"}])
    assert [i for i in ids if i in made.special_ids] == [1, 2, 1]


def test_the_same_texts_give_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(iter(TEXTS), 320, tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_files_are_those_of_the_library(tmp_path: Path) -> None:
    made = train_tokenizer(TEXTS, 350, tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "It's 12345 lamps,\n\n  red\tand blue — 日本."
    assert inner.encode(text).ids == made.encode(text)
    again = load_tokenizer(tmp_path)
    assert again is not None
    assert again.encode(text) == made.encode(text)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == (
        "<|endoftext|>"
    )


def test_other_special_tokens_and_no_template(tmp_path: Path) -> None:
    made = train_tokenizer(
        TEXTS, 300, tmp_path, special_tokens=["</s>"], end_of_text="</s>", chat_template=None
    )
    assert made.chat_template is None
    assert made.eos_ids == {0}


def test_what_is_trained_with_it_ends_as_it_should(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:5]))
    made = train_tokenizer(texts_of(str(data)), 300, tmp_path / "made")
    loaded = load_data(str(data), made, max_length=500)
    assert all(example.tokens[-1] == 0 for example in loaded.train)


def test_texts_of_any_format_are_found(tmp_path: Path) -> None:
    user = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
    other = {"role": "assistant", "content": "b"}
    for row, texts in (
        ({"messages": [user, answer]}, ["q", "a"]),
        ({"prompt": "q", "completion": "a"}, ["q", "a"]),
        ({"text": "t"}, ["t"]),
        ({"prompt": [user], "chosen": [answer], "rejected": [other]}, ["q", "a", "q", "b"]),
    ):
        path = tmp_path / "d.jsonl"
        path.write_text(json.dumps(row))
        assert list(texts_of(str(path))) == texts


@pytest.mark.parametrize(
    ("texts", "settings", "error", "words"),
    [
        ([], {}, InvalidRequest, "no text"),
        (["", ""], {}, InvalidRequest, "no text"),
        (["a", 3], {}, InvalidRequest, "text 2 is no text but int"),
        (["a\ud800"], {}, InvalidRequest, "lone surrogate"),
        (["a"], {"vocab_size": 258}, InvalidRequest, "take 259"),
        (["a"], {"special_tokens": ["x", "x"]}, InvalidRequest, "must differ"),
        (["a"], {"end_of_text": "</s>"}, InvalidRequest, "'</s>' ends a text"),
        (["a"], {"min_frequency": 0}, InvalidRequest, "min_frequency"),
        (["a"], {"chat_template": "{% if %}"}, TemplateError, "does not parse"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path, texts, settings, error, words) -> None:
    with pytest.raises(error, match=words):
        train_tokenizer(texts, **{"vocab_size": 300, "folder": tmp_path / "x", **settings})
