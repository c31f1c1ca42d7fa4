"""Finds out what a file of chats is, and reads it. No file is trusted."""

from __future__ import annotations

import codecs
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from localllm.errors import InvalidRequest
from localllm.tui.exchange import jsonl, markdown
from localllm.tui.exchange.chatgpt import is_chatgpt, read_conversation
from localllm.tui.exchange.files import MOST_BYTES, parsed
from localllm.tui.exchange.openwebui import is_openwebui, read_chat
from localllm.tui.exchange.trees import ChatTree

MOST_CHATS = 100_000
_MOST_WRONG = 100  # complaints
_IN_ZIP = "conversations.json"


@dataclass(frozen=True)
class Found:
    """What a file holds. form: "localllm", "Markdown", "ChatGPT" or "Open WebUI". wrong: what
    could not be read, in words; the rest was."""

    form: str
    chats: tuple[ChatTree, ...]
    wrong: tuple[str, ...] = ()


def read_chats(path: Path) -> Found:
    """Raises InvalidRequest for a file that is of no known form, too large or damaged."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InvalidRequest(f"{path} has more than {MOST_BYTES:,} bytes")
        if not path.is_file():
            raise InvalidRequest(f"{path} is no file")
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _from_zip(path)
            file.seek(0)
            return _read(file, path)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror or error}") from error


def _read(file: IO[bytes], path: Path) -> Found:
    first = file.readline(1 << 16)
    file.seek(0)
    if jsonl.is_ours(first.decode("utf-8", "replace").lstrip("\ufeff")):
        return _gather("localllm", jsonl.read_jsonl(_lines(file)))
    data = file.read(MOST_BYTES + 1).removeprefix(codecs.BOM_UTF8)
    if data.lstrip()[:1] in (b"[", b"{"):
        return _from_json(data, path)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is no text in UTF-8: {error}") from error
    if markdown.is_ours(text):
        return _gather("Markdown", [markdown.read_markdown(text)])
    raise InvalidRequest(
        f"{path} holds no chats that can be read",
        hint="known are: exports of localllm (JSONL and Markdown), ChatGPT's conversations.json "
        "or its ZIP, and Open WebUI's JSON",
    )


def _from_json(data: bytes, path: Path) -> Found:
    found = parsed(data, str(path))
    entries = found if isinstance(found, list) else [found]
    if len(entries) > MOST_CHATS:
        raise InvalidRequest(f"{path} has more than {MOST_CHATS:,} chats")
    if is_chatgpt(found):
        return _gather("ChatGPT", _each(entries, read_conversation))
    if is_openwebui(found):
        return _gather("Open WebUI", _each(entries, read_chat))
    raise InvalidRequest(
        f"{path} is JSON, and neither ChatGPT's conversations nor Open WebUI's chats"
    )


def _from_zip(path: Path) -> Found:
    """ChatGPT's whole export. Of the archive, one file is read, within bounds."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.rpartition("/")[2] == _IN_ZIP]
            if not names:
                raise InvalidRequest(f"{path} has no {_IN_ZIP} in it")
            if archive.getinfo(names[0]).file_size > MOST_BYTES:
                raise InvalidRequest(f"{_IN_ZIP} in {path} has more than {MOST_BYTES:,} bytes")
            with archive.open(names[0]) as file:
                data = file.read(MOST_BYTES + 1)  # whatever its header says
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise InvalidRequest(f"{path} is a damaged ZIP archive: {error}") from error
    if len(data) > MOST_BYTES:
        raise InvalidRequest(f"{_IN_ZIP} in {path} has more than {MOST_BYTES:,} bytes")
    return _from_json(data, path)


def _each(
    entries: Iterable[Any], read: Callable[[Any], ChatTree]
) -> Iterator[ChatTree | InvalidRequest]:
    for number, entry in enumerate(entries, 1):
        try:
            yield read(entry)
        except InvalidRequest as error:
            yield InvalidRequest(f"chat {number}: {error}")


def _gather(form: str, found: Iterable[ChatTree | InvalidRequest]) -> Found:
    chats: list[ChatTree] = []
    wrong: list[str] = []
    for one in found:
        if isinstance(one, InvalidRequest):
            wrong.append(str(one))
        elif one.nodes:
            chats.append(one)
        if len(chats) > MOST_CHATS:
            raise InvalidRequest(f"the file has more than {MOST_CHATS:,} chats")
    if len(wrong) > _MOST_WRONG:
        wrong[_MOST_WRONG:] = [f"and {len(wrong) - _MOST_WRONG:,} more"]
    return Found(form, tuple(chats), tuple(wrong))


def _lines(file: IO[bytes]) -> Iterator[str]:
    for line in file:
        yield line.decode("utf-8", "replace").lstrip("\ufeff")
