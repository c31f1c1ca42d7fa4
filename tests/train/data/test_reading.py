"""Rows out of files of every kind and encoding, with the line of what is wrong."""

from __future__ import annotations

import codecs
import csv
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localllm.errors import InvalidRequest
from localllm.train.data import reading
from localllm.train.data.reading import rows

TEXT = st.text(max_size=12)
ROWS = st.lists(st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}), min_size=1, max_size=5)


def found(source: Path | str) -> list[Any]:
    return [row for _, row in rows(str(source))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=ROWS,
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    end=st.sampled_from(["\n", "\r\n"]),
    ascii_=st.booleans(),
)
def test_lines_are_read_whatever_their_encoding_and_ends(
    tmp_path: Path, data: list[dict[str, str]], encoding: str, end: str, ascii_: bool
) -> None:
    path = tmp_path / "d.jsonl"
    text = end.join(json.dumps(row, ensure_ascii=ascii_) for row in data)
    path.write_bytes(text.encode(encoding))
    assert found(path) == data
    (tmp_path / "d.json").write_bytes(json.dumps(data, ensure_ascii=ascii_).encode(encoding))
    assert found(tmp_path / "d.json") == data


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=ROWS,
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    delimiter=st.sampled_from([",", ";", "\t"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_tables_are_read_whatever_their_dialect(
    tmp_path: Path, data: list[dict[str, str]], encoding: str, delimiter: str, end: str
) -> None:
    path = tmp_path / "d.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(
            file, ["prompt", "completion"], delimiter=delimiter, lineterminator=end,
            quoting=csv.QUOTE_ALL,
        )  # fmt: skip
        writer.writeheader()
        writer.writerows(data)
    assert found(path) == data


def test_cells_hold_messages_or_text_that_looks_like_data(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}]
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["messages", "note"], [json.dumps(messages), '[{"x": 1}]'], ["[]", '{"a": 2}']]
        )
    assert found(path) == [
        {"messages": messages, "note": '[{"x": 1}]'},
        {"messages": "[]", "note": '{"a": 2}'},
    ]


def test_a_json_file_may_be_an_array_wrapped_a_row_or_lines(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}]}
    path = tmp_path / "d.json"
    for written in ([row, row], {"data": [row, row]}):
        path.write_text(json.dumps(written))
        assert found(path) == [row, row]
    path.write_text(json.dumps(row))
    assert found(path) == [row]
    path.write_text(json.dumps(row) + "\n" + json.dumps(row))
    assert found(path) == [row, row]


def test_parquet_gives_rows_without_what_was_not_there(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = [
        {"messages": [{"role": "user", "content": "q"}]},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"x": 1}]}]},
    ]
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(data), path)
    assert found(path) == data
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InvalidRequest, match=r"d\.parquet is no Parquet file"):
        found(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"a": 1}\r\n\r\n{"a"\r\n', r"d\.jsonl:3: this is no JSON"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}', r"d\.jsonl:2: this is no UTF-8: .* at byte 7"),
        ("d.jsonl", b'{"a": 1}\n"a"', r"d\.jsonl:2: a row must be an object, not str"),
        ("d.jsonl", b"[" * 100_000, r"d\.jsonl:1: this is no JSON"),
        ("d.jsonl", b'{"a": "' + b"x" * 2000 + b'"}', r"d\.jsonl:1: the line is longer"),
        (
            "d.jsonl",
            codecs.BOM_UTF16_LE + '{"a": 1}\n{"a'.encode("utf-16-le"),
            r"d\.jsonl:2: this is no JSON",
        ),
        ("d.jsonl", codecs.BOM_UTF16_LE + b"\x00\xd8\x00", r"d\.jsonl:1: this is no UTF-16"),
        ("d.json", b"[1]", r"d\.json: entry 1 must be an object, not int"),
        ("d.json", b"3", r"d\.json: this is no array of objects"),
        ("d.json", b"[{", r"d\.json: this is no JSON: .* line 1 column 3"),
        ("d.csv", b"a,b\n1,2\n1\n", r"d\.csv:3: the row has 1 fields, and the header 2"),
        ("d.csv", b'a,b\n1,"x\ny"\n1,2,3\n', r"d\.csv:4: the row has 3 fields"),
        ("d.csv", b'a,b\n1,"2', r"d\.csv:2: this is no CSV"),
        ("d.csv", b"a,a\n1,2\n", r"d\.csv:1: the header names a column twice"),
        ("d.csv", b"a,b\n1,\xff\n", r"d\.csv: this is no UTF-8"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    name: str, content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if b"xxxx" in content:
        monkeypatch.setattr(reading, "MAX_LINE", 1000)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=message):
        found(path)


def test_a_folder_and_nothing_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="it is a folder"):
        found(tmp_path)
    with pytest.raises(InvalidRequest, match="it does not exist"):
        found(tmp_path / "x.jsonl")


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nbroken')
    reader = rows(str(path))
    assert [next(reader), next(reader)] == [("d.jsonl:1", {"a": 1}), ("d.jsonl:2", {"a": 2})]


class _Hub(types.ModuleType):
    """Stands in for `datasets`: remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.asked: list[tuple[str, str, bool]] = []

    def load_dataset(self, name: str, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        self.asked.append((name, split, streaming))
        if name == "no/where":
            raise RuntimeError("Dataset 'no/where' doesn't exist on the Hub")
        yield {"text": split, "meta": None}


def test_the_hub_is_asked_for_a_split_and_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert list(rows("hf:own/er")) == [("own/er:1", {"text": "train"})]
    assert found("hf:own/er:test") == [{"text": "test"}]
    assert hub.asked == [("own/er", "train", True), ("own/er", "test", True)]
    with pytest.raises(InvalidRequest, match=r"hf:no/where cannot be read: .* doesn't exist"):
        found("hf:no/where")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidRequest) as error:
        found("hf:own/er")
    assert "localllm[datasets]" in (error.value.hint or "")


def test_the_true_library_reads_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `save_to_disk` writes, and files in a folder. Nothing is fetched."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = [{"prompt": "q", "completion": f"a{n}"} for n in range(3)]
    made = datasets.Dataset.from_list(data)
    made.save_to_disk(str(tmp_path / "one"))
    assert found(f"hf:{tmp_path / 'one'}") == data
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(
        str(tmp_path / "two")
    )
    assert found(f"hf:{tmp_path / 'two'}:test") == data[1:2]
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data))
    assert found(f"hf:{tmp_path / 'three'}") == data
