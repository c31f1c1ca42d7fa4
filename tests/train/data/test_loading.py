"""Files of examples: every format, an account of every row, and errors that name the line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localllm.errors import InvalidRequest
from localllm.tokenizer import Tokenizer, load_tokenizer
from localllm.train.data import Preference, TrainingData, load_data
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    found = load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))
    assert found is not None
    return found


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def said(data: TrainingData, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(one.tokens[one.trained].tolist()) for one in data.train]


ONE = [
    ("chat", chat("a", "b")),
    ("chat", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    ("chat", {"system": "s", **chat("a", "b")}),
    ("prompt-completion", {"prompt": "a", "completion": "b"}),
    ("prompt-completion", {"instruction": "a", "input": "more", "output": "b"}),
    ("prompt-completion", {"question": "a", "answer": "b", "id": 3}),
    (
        "prompt-completion",
        {"prompt": chat("a", "")["messages"][:1], "completion": chat("", "b")["messages"][1:]},
    ),
]


@pytest.mark.parametrize(("kind", "row"), ONE)
def test_formats_are_told_by_their_fields(
    kind: str, row: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    data = load_data(lines(tmp_path / "d.jsonl", [row]), tokenizer)
    assert data.report.kind == kind
    assert said(data, tokenizer) == ["b"]
    assert data.report.trained_tokens == 2  # and the end of the turn


def test_texts_are_trained_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = load_data(lines(tmp_path / "d.jsonl", [{"text": "abc"}]), tokenizer)
    assert said(data, tokenizer) == ["bc"]
    assert "(75%, everything)" in data.report.lines()[1]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": chat("a", "b")["messages"], "rejected": chat("a", "c")["messages"]},
        {
            "prompt": chat("a", "")["messages"][:1],
            "chosen": chat("", "b")["messages"][1:],
            "rejected": "c",
        },
    ],
)
def test_preferences_have_one_prompt_and_two_answers(
    row: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    data = load_data(lines(tmp_path / "d.jsonl", [row]), tokenizer)
    (pair,) = data.train
    assert isinstance(pair, Preference)
    assert tokenizer.decode(pair.chosen.tokens[pair.chosen.trained].tolist()) == "b"
    assert tokenizer.decode(pair.rejected.tokens[pair.rejected.trained].tolist()) == "c"
    start = int(np.flatnonzero(pair.chosen.trained)[0])
    assert np.array_equal(pair.chosen.tokens[:start], pair.rejected.tokens[:start])


def test_the_same_rows_from_any_file_are_the_same_data(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [{"prompt": f"é {n}", "completion": f"b,\n{n}"} for n in range(5)]
    jsonl = lines(tmp_path / "d.jsonl", rows)
    (tmp_path / "d.json").write_text("\ufeff" + json.dumps({"data": rows}), encoding="utf-8")
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "crlf.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows)
    )
    prints = {
        load_data(str(path), tokenizer).fingerprint
        for path in (jsonl, tmp_path / "d.json", tmp_path / "d.csv", tmp_path / "crlf.jsonl")
    }
    assert len(prints) == 1
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert load_data(str(tmp_path / "d.parquet"), tokenizer).fingerprint in prints


def test_every_row_is_accounted_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        chat("a", "b"),
        chat("a", "b"),
        chat("a", " "),
        {"messages": [{"role": "user", "content": "x"}]},
        chat("long", "c" * 90),
        chat("fine", "d"),
        chat("held", "e"),
    ]
    held = lines(tmp_path / "v.jsonl", [chat("held", "e"), chat("other", "f")])
    data = load_data(
        lines(tmp_path / "d.jsonl", rows), tokenizer, max_length=60, on_long="drop", valid=held
    )
    report = data.report
    assert (report.rows, report.train, report.valid) == (9, 2, 2)
    assert (report.duplicates, report.empty, report.unanswered) == (1, 1, 1)
    assert (report.shared, report.long, report.dropped_long) == (1, 1, 1)
    assert report.dropped + report.train + report.valid == report.rows
    told = "\n".join(report.lines())
    assert "9 rows of chat" in told
    assert "1 row over the limit" in told


def test_long_examples_are_refused_dropped_or_cut_as_asked(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = lines(tmp_path / "d.jsonl", [chat("q", "a"), chat("q", "b" * 99)])
    with pytest.raises(
        InvalidRequest, match=r"d\.jsonl:2: the example has 1\d\d tokens.*at most 64"
    ):
        load_data(source, tokenizer, max_length=64)
    cut = load_data(source, tokenizer, max_length=64, on_long="cut")
    assert [len(one) for one in cut.train][1] == 64
    whole = load_data(source, tokenizer, max_length=200)
    assert np.array_equal(cut.train[1].tokens, whole.train[1].tokens[:64])
    assert (cut.report.cut, cut.report.cut_tokens) == (1, len(whole.train[1]) - 64)


def test_texts_are_cut_into_pieces_and_nothing_is_lost(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = "".join(chr(97 + n % 26) for n in range(100))
    data = load_data(
        lines(tmp_path / "d.jsonl", [{"text": text}]), tokenizer, max_length=16, on_long="cut"
    )
    assert data.report.split == 1
    ids = np.concatenate([one.tokens for one in data.train])
    assert tokenizer.decode(ids.tolist()) == text


def test_a_row_stays_in_validation_when_others_come(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [chat(f"question {n}", f"answer {n}") for n in range(200)]

    def held(name: str, rows: list[Any], seed: int = 3) -> set[str]:
        source = lines(tmp_path / name, rows)
        data = load_data(source, tokenizer, valid_fraction=0.25, seed=seed)
        assert len(data.train) + len(data.valid) == len(rows)
        return {tokenizer.decode(one.tokens.tolist()) for one in data.valid}

    few, all_ = held("a.jsonl", rows[:120]), held("b.jsonl", rows)
    assert 30 <= len(all_) <= 70
    assert few < all_
    assert held("c.jsonl", rows[::-1]) == all_
    assert held("b.jsonl", rows, seed=4) != all_


@pytest.mark.parametrize("fraction", [1e-9, 0.999_999])
def test_neither_side_of_a_split_is_empty(
    fraction: float, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = lines(tmp_path / "d.jsonl", [chat("a", "b"), chat("a", "c"), chat("a", "d")])
    data = load_data(source, tokenizer, valid_fraction=fraction)
    assert {len(data.train), len(data.valid)} == {1, 2}
    one = load_data(lines(tmp_path / "e.jsonl", [chat("a", "b")]), tokenizer, valid_fraction=0.5)
    assert (len(one.train), len(one.valid)) == (1, 0)


def test_every_over_long_example_is_counted_before_refusing(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [chat("q", "a"), chat("q", "b" * 70), chat("q", "c" * 90), chat("q", "d" * 80)]
    with pytest.raises(InvalidRequest, match=r"3 are longer.*longest has \d+ \(d\.jsonl:3\)"):
        load_data(lines(tmp_path / "d.jsonl", rows), tokenizer, max_length=60)


def test_a_prompt_of_messages_is_not_trained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [*chat("a", "one")["messages"], {"role": "user", "content": "b"}]
    rows = [{"prompt": turns, "completion": "two"}]
    held = lines(tmp_path / "v.jsonl", [{"prompt": turns, "completion": "three"}])
    data = load_data(lines(tmp_path / "d.jsonl", rows), tokenizer, valid=held)
    assert said(data, tokenizer) == ["two"]
    assert len(data.valid) == 1


def test_of_a_preference_only_the_answers_are_trained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    before = [*chat("a", "one")["messages"], {"role": "user", "content": "b"}]
    answers = [{"role": "assistant", "content": text} for text in ("yes", "no")]
    row = {"chosen": [*before, answers[0]], "rejected": [*before, answers[1]]}
    same = {"chosen": [*before, answers[0]], "rejected": [*before, answers[0]]}
    empty = {"chosen": [*before, {"role": "assistant", "content": ""}], "rejected": row["rejected"]}
    data = load_data(lines(tmp_path / "d.jsonl", [row, same, empty]), tokenizer)
    (pair,) = data.train
    assert isinstance(pair, Preference)
    assert tokenizer.decode(pair.chosen.tokens[pair.chosen.trained].tolist()) == "yes"
    assert tokenizer.decode(pair.rejected.tokens[pair.rejected.trained].tolist()) == "no"
    assert (data.report.same, data.report.empty) == (1, 1)


def test_a_pair_over_the_limit_counts_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": "a", "chosen": "b" * 90, "rejected": "c" * 90},
        {"prompt": "a", "chosen": "b", "rejected": "c" * 90},
        {"prompt": "a" * 90, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    source = lines(tmp_path / "d.jsonl", rows)
    with pytest.raises(InvalidRequest, match="3 are longer"):
        load_data(source, tokenizer, max_length=40)
    report = load_data(source, tokenizer, max_length=40, on_long="drop").report
    assert (report.long, report.dropped_long, report.train) == (3, 3, 1)
    cut = load_data(source, tokenizer, max_length=40, on_long="cut")
    assert (cut.report.cut, cut.report.untrained, cut.report.train) == (2, 1, 3)
    assert cut.report.dropped + cut.report.train == cut.report.rows
    assert all(len(pair.chosen) <= 40 and len(pair.rejected) <= 40 for pair in cut.train)


def test_a_template_may_be_given_by_name_or_as_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = lines(tmp_path / "d.jsonl", [chat("a", "b")])
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    data = load_data(source, tokenizer, chat_template=template)
    assert tokenizer.decode(data.train[0].tokens.tolist(), skip_special=False) == "a<|end|>b<|end|>"
    assert data.report.as_chat


def test_a_date_in_the_template_makes_no_other_data_tomorrow(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = lines(tmp_path / "d.jsonl", [chat("a", "b")])
    template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    )
    data = load_data(source, tokenizer, chat_template=template)
    assert tokenizer.decode(data.train[0].tokens.tolist()).startswith("26 Jul 2024")
    assert "fixed one" in "\n".join(data.report.lines())


def test_other_content_has_another_fingerprint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    a = load_data(lines(tmp_path / "a.jsonl", [chat("a", "b")]), tokenizer)
    b = load_data(lines(tmp_path / "b.jsonl", [chat("a", "c")]), tokenizer)
    c = load_data(lines(tmp_path / "c.jsonl", [chat("a", "b")]), tokenizer, train_on="all")
    assert len({a.fingerprint, b.fingerprint, c.fingerprint}) == 3


BAD = [
    (b'{"messages": 3}\n', r"d\.jsonl:1: a row with 'messages' is of no known format"),
    (b'{"text": "a"}\n{"x', r"d\.jsonl:2: this is no JSON"),
    (b"[1]\n", r"d\.jsonl:1: a row must be an object, not list"),
    (b'{"text": "\xff"}\n', r"d\.jsonl:1: this is no UTF-8"),
    (b'{"text": "a", "messages": []}\n', r"could be chat or text"),
    (b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', r"d\.jsonl:2: there is no 'text'"),
    (b'{"text": "a"}\n{"text": 3}\n', r"d\.jsonl:2: 'text' must be text, not int"),
    (b'{"messages": [{"content": "a"}]}\n', r"message 1 of 'messages' has no role"),
    (b'{"conversations": [{"from": "martian", "value": "a"}]}\n', r"martian"),
    (b'{"prompt": 1, "completion": "b"}\n', r"'prompt' must be a list of messages"),
    (b'{"chosen": "a", "rejected": "b"}\n', r"no 'prompt'"),
    (b"", r"holds no rows"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD)
def test_what_is_wrong_is_named_with_its_line(
    content: bytes, message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=message):
        load_data(str(path), tokenizer)


def test_a_missing_file_and_senseless_settings_are_named(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(InvalidRequest, match=r"no file .*nowhere\.jsonl"):
        load_data(str(tmp_path / "nowhere.jsonl"), tokenizer)
    source = lines(tmp_path / "d.jsonl", [chat("a", "b")])
    for wrong in (
        {"kind": "chats"}, {"train_on": "user"}, {"on_long": "keep"}, {"max_length": 1},
        {"valid_fraction": 1.0}, {"limit": 0}, {"valid": source, "valid_fraction": 0.1},
    ):  # fmt: skip
        with pytest.raises(InvalidRequest):
            load_data(source, tokenizer, **wrong)  # type: ignore[arg-type]


def test_a_chat_without_a_template_is_refused_with_the_way_out(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bare = load_tokenizer(write_tiny_model(tmp_path / "bare", chat_template=False))
    assert bare is not None
    source = lines(tmp_path / "d.jsonl", [chat("a", "b")])
    with pytest.raises(InvalidRequest, match="no chat template") as error:
        load_data(source, bare)
    assert "--chat-template" in (error.value.hint or "")
