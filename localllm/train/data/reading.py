"""Rows out of files: JSON lines, JSON, CSV, Parquet, and data sets of the Hugging Face hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from localllm.errors import InvalidRequest

MAX_LINE = 64 << 20  # bytes of a row
_MAX_FILE = 4 << 30  # bytes of a file that is read at once (.json)
_MAX_FIELD = 16 << 20  # characters of a CSV field

Row = Mapping[str, Any]


def rows(source: str) -> Iterator[tuple[str, Row]]:
    """(origin, row) of a file, or of "hf:owner/name[:split]". origin: "file:line".

    Raises InvalidRequest naming the file and the line, and what is wrong there.
    """
    if source.startswith("hf:"):
        yield from _hub(source)
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise InvalidRequest(
            f"there is no file {source}",
            hint="data is a .jsonl, .json, .csv or .parquet file, or hf:owner/name",
        )
    readers = {".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    yield from readers.get(path.suffix.lower(), _lines)(path)


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with path.open("rb") as file:
            number = 0
            while data := file.readline(MAX_LINE + 1):
                number += 1
                origin = f"{path.name}:{number}"
                if len(data) > MAX_LINE:
                    raise InvalidRequest(f"{origin}: the line is longer than {MAX_LINE:,} bytes")
                if data.strip():
                    yield origin, _object(origin, _text(origin, data, first=number == 1))
    except OSError as error:
        raise _unreadable(path, error) from error


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    """An array of objects; a file with an object a line is read as one, whatever its name."""
    try:
        if path.stat().st_size > _MAX_FILE:
            raise InvalidRequest(
                f"{path.name} is too large to be read at once", hint="write it as .jsonl"
            )
        text = _text(path.name, path.read_bytes(), first=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            yield from _lines(path)
            return
        raise InvalidRequest(f"{path.name}: this is no JSON: {error}") from None
    if isinstance(found, Mapping):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else [found]
    if not isinstance(found, list):
        raise InvalidRequest(f"{path.name}: this is no array of objects")
    for number, row in enumerate(found, 1):
        if not isinstance(row, Mapping):
            raise InvalidRequest(f"{path.name}: entry {number} is no object")
        yield f"{path.name}:{number}", row


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(_MAX_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in reader:
                origin = f"{path.name}:{reader.line_num}"
                if None in row or None in row.values():
                    raise InvalidRequest(
                        f"{origin}: the row has another number of fields than the header"
                    )
                yield origin, {key: _cell(value) for key, value in row.items()}
    except csv.Error as error:
        raise InvalidRequest(f"{path.name}: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path.name} is no UTF-8: {error}") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _cell(value: str) -> Any:
    """Lists of messages come as JSON within a cell."""
    if value[:1] in "[{" and value:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


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
        with parquet.ParquetFile(path) as file:  # type: ignore[no-untyped-call]
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidRequest(f"{path.name} is no Parquet file that can be read: {error}") from error


def _hub(source: str) -> Iterator[tuple[str, Row]]:
    name, _, split = source.removeprefix("hf:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise InvalidRequest(
            f"{source} is a data set of the hub, and `datasets` is not installed",
            hint="pip install 'localllm[datasets]'",
        ) from None
    try:
        found = load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(found, 1):
            yield f"{name}:{number}", row
    except InvalidRequest:
        raise
    except Exception as error:  # of many kinds, from many libraries
        raise InvalidRequest(f"{source} cannot be read: {error}") from error


def _text(origin: str, data: bytes, *, first: bool) -> str:
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{origin}: this is no UTF-8: {error.reason}") from error


def _object(origin: str, text: str) -> Row:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{origin}: this is no JSON: {error}") from None
    if not isinstance(row, Mapping):
        raise InvalidRequest(f"{origin}: a row must be an object, not {type(row).__name__}")
    return row


def _unreadable(path: Path, error: OSError) -> InvalidRequest:
    return InvalidRequest(f"{path} cannot be read: {error.strerror or error}")
