"""Rows out of files: JSON lines, JSON, CSV, Parquet, and data sets of the Hugging Face hub."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from localllm.errors import InvalidRequest

MAX_LINE = 64 << 20  # bytes of a row
_MAX_FILE = 4 << 30  # bytes of a file that is read at once (.json)
_MAX_FIELD = 16 << 20  # characters of a CSV field
_WIDE = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_DELIMITERS = ",;\t"

Row = Mapping[str, Any]


def rows(source: str) -> Iterator[tuple[str, Row]]:
    """(origin, row) of a file, or of "hf:owner/name[:split]". origin: "file:line".

    Text is UTF-8, or UTF-16 with its mark; a mark and either kind of line end do no harm. "hf:"
    takes a local folder too. Raises InvalidRequest naming the file and the line, and what is wrong
    there.
    """
    if source.startswith("hf:"):
        yield from _hub(source)
        return
    path = Path(source).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InvalidRequest(
            f"there is no file {source}: it {what}",
            hint="data is a .jsonl, .json, .csv or .parquet file, or hf:owner/name, or hf:FOLDER",
        )
    readers = {".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    try:
        yield from readers.get(path.suffix.lower(), _lines)(path)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    if _encoding(path) != "utf-8-sig":
        yield from _wide_lines(path)
        return
    with path.open("rb") as file:
        number = 0
        while data := file.readline(MAX_LINE + 1):
            number += 1
            origin = f"{path.name}:{number}"
            if len(data) > MAX_LINE:
                raise _too_long(origin)
            if data.strip():
                yield origin, _object(origin, _text(origin, data, first=number == 1))


def _wide_lines(path: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with path.open(encoding=_encoding(path)) as file:
            while text := file.readline(MAX_LINE // 2 + 1):
                number += 1
                origin = f"{path.name}:{number}"
                if len(text) > MAX_LINE // 2:
                    raise _too_long(origin)
                if text.strip():
                    yield origin, _object(origin, text)
    except UnicodeError as error:
        raise InvalidRequest(f"{path.name}:{number + 1}: this is no UTF-16: {error}") from error


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    """An array of objects; a file with an object a line is read as one, whatever its name."""
    if path.stat().st_size > _MAX_FILE:
        raise InvalidRequest(
            f"{path.name} is too large to be read at once", hint="write it as .jsonl"
        )
    try:
        text = path.read_bytes().decode(_encoding(path))
    except UnicodeError as error:
        raise InvalidRequest(f"{path.name}: this is no UTF-8: {error}") from error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            yield from _lines(path)
            return
        raise InvalidRequest(f"{path.name}: this is no JSON: {error}") from None
    if isinstance(found, Mapping):
        lists = [value for value in found.values() if isinstance(value, list)]
        # {"data": [{…}, {…}]}, but not a single row that holds a list of messages.
        wrapped = len(found) == 1 and len(lists) == 1 and "messages" not in found
        found = lists[0] if wrapped and "conversations" not in found else [found]
    if not isinstance(found, list):
        raise InvalidRequest(f"{path.name}: this is no array of objects")
    for number, row in enumerate(found, 1):
        if not isinstance(row, Mapping):
            raise InvalidRequest(
                f"{path.name}: entry {number} must be an object, not {type(row).__name__}"
            )
        yield f"{path.name}:{number}", row


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(_MAX_FIELD)
    line = 1
    try:
        with path.open(encoding=_encoding(path), newline="") as file:
            reader = csv.reader(file, delimiter=_delimiter(file), strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise InvalidRequest(f"{path.name}:1: the header names a column twice")
            line = reader.line_num + 1
            for cells in reader:
                origin = f"{path.name}:{line}"
                if cells and len(cells) != len(header):
                    raise InvalidRequest(
                        f"{origin}: the row has {len(cells)} fields, and the header {len(header)}"
                    )
                if cells:
                    yield origin, dict(zip(header, map(_cell, cells), strict=True))
                line = reader.line_num + 1
    except csv.Error as error:
        raise InvalidRequest(f"{path.name}:{line}: this is no CSV: {error}") from error
    except UnicodeError as error:
        raise InvalidRequest(
            f"{path.name}: this is no UTF-8, some lines after {line}: {error}"
        ) from error


def _delimiter(file: io.TextIOBase) -> str:
    """What the header has most of."""
    header = file.readline(_MAX_FIELD)
    file.seek(0)
    return max(_DELIMITERS, key=header.count)


def _cell(value: str) -> Any:
    """A list of messages comes as JSON within a cell; other JSON is text that may be trained on."""
    if not value.startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    messages = isinstance(found, list) and all(
        isinstance(one, Mapping) and ("role" in one or "from" in one) for one in found
    )
    return found if found and messages else value


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InvalidRequest(
            f"{path.name} is Parquet, and `pyarrow` is not installed",
            hint="pip install 'localllm[data]'",
        ) from None
    try:
        number = 0
        # Typed or not, as the installed pyarrow is.
        with parquet.ParquetFile(path) as file:  # type: ignore[no-untyped-call,unused-ignore]
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", _without_nulls(row)
    except pyarrow.ArrowException as error:
        raise InvalidRequest(f"{path.name} is no Parquet file that can be read: {error}") from error


def _hub(source: str) -> Iterator[tuple[str, Row]]:
    """Streamed from the hub; a folder is what `save_to_disk` wrote, or files that it knows."""
    name, _, split = source.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ImportError:
        raise InvalidRequest(
            f"{source} is a data set of the hub, and `datasets` is not installed",
            hint="pip install 'localllm[datasets]'",
        ) from None
    folder = Path(name).expanduser()
    saved = any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(str(folder))
            if isinstance(found, dict):
                found = found[split or "train"]
        else:
            where = str(folder) if folder.is_dir() else name
            found = datasets.load_dataset(where, split=split or "train", streaming=True)
        for number, row in enumerate(found, 1):
            yield f"{name}:{number}", _without_nulls(row)
    except (InvalidRequest, GeneratorExit):
        raise
    except Exception as error:  # of many kinds, from many libraries
        raise InvalidRequest(f"{source} cannot be read: {error}") from error


def _without_nulls(value: Any) -> Any:
    """Tables give every object the fields that any has; those without a value were not there."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        return _WIDE.get(file.read(2), "utf-8-sig")


def _text(origin: str, data: bytes, *, first: bool) -> str:
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{origin}: this is no UTF-8: {error.reason} at byte {error.start}",
            hint="save the file as UTF-8",
        ) from error


def _object(origin: str, text: str) -> Row:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{origin}: this is no JSON: {error}") from None
    if not isinstance(row, Mapping):
        raise InvalidRequest(f"{origin}: a row must be an object, not {type(row).__name__}")
    return row


def _too_long(origin: str) -> InvalidRequest:
    return InvalidRequest(f"{origin}: the line is longer than {MAX_LINE:,} bytes")
