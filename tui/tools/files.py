"""Reading files below one chosen folder, and nothing outside of it."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from localllm.errors import InvalidRequest
from localllm.tui.attachments import decode
from localllm.tui.tools.tool import Tool, ToolFailed

_MOST_BYTES = 2 << 20
_MOST_ENTRIES = 500
_LINES = 400  # at a time, unless asked for others
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def read_below(folder: Path, path: str, start: int = 1, lines: int = _LINES) -> str:
    """Lines of a text file, or the names in a folder. start: the first line, from 1.

    Every step of the way is opened beneath the one before, links are never followed: what changes
    on disk meanwhile leads nowhere else. Raises ToolFailed.
    """
    parts = _parts(path)
    try:
        with _opened(folder, parts) as file:
            if stat.S_ISDIR(os.fstat(file).st_mode):
                return _listing(file)
            return _lines(_read(file, path), path, start, lines)
    except OSError as error:
        raise ToolFailed(f"{path} cannot be read: {_words(error)}") from None


def reader(folder: Path) -> Tool:
    """The tool for one folder, which the model does not learn the place of."""

    async def call(arguments: Mapping[str, Any]) -> str:
        start, lines = int(arguments.get("start") or 1), int(arguments.get("lines") or _LINES)
        path = str(arguments["path"])
        return await asyncio.to_thread(read_below, folder, path, start, lines)

    return Tool(
        "read_file",
        "Reads a text file in the user's chosen folder, or lists a folder in it; . is that folder.",
        {
            "type": "object",
            "properties": {
                "path": {"type": "string", "description": "relative to the folder"},
                "start": {"type": "integer", "description": "first line, 1 unless given"},
                "lines": {"type": "integer", "description": f"how many, {_LINES} unless given"},
            },
            "required": ["path"],
            "additionalProperties": False,
        },
        call,
    )


def _parts(path: str) -> tuple[str, ...]:
    pure = PurePosixPath(path.replace(os.sep, "/"))
    if "\0" in path or pure.is_absolute() or ".." in pure.parts:
        raise ToolFailed(f"{path!r} is outside of the folder: give a path in it, without ..")
    return pure.parts


@contextmanager
def _opened(folder: Path, parts: tuple[str, ...]) -> Iterator[int]:
    """A descriptor of what is there; for a pipe or a device it would wait, so it never does."""
    # The folder itself was chosen by the person, and may be a link.
    current = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        for part in parts:
            deeper = os.open(part, _READ | os.O_NONBLOCK, dir_fd=current)
            os.close(current)
            current = deeper
        yield current
    finally:
        os.close(current)


def _read(file: int, path: str) -> str:
    facts = os.fstat(file)
    if not stat.S_ISREG(facts.st_mode):
        raise ToolFailed(f"{path} is no ordinary file")
    if facts.st_size > _MOST_BYTES:
        raise ToolFailed(f"{path} has {facts.st_size:,} bytes; {_MOST_BYTES:,} can be read at most")
    with os.fdopen(os.dup(file), "rb") as stream:
        data = stream.read(_MOST_BYTES + 1)
    try:
        return decode(data, Path(path))[0]
    except InvalidRequest as error:
        raise ToolFailed(str(error)) from None


def _lines(text: str, path: str, start: int, count: int) -> str:
    lines = text.splitlines()
    start, count = max(1, start), max(1, count)
    if start > max(1, len(lines)):
        raise ToolFailed(f"{path} has {len(lines)} lines")
    shown = lines[start - 1 : start - 1 + count]
    left = len(lines) - (start - 1 + len(shown))
    end = f"\n[{left} lines more, from line {start + len(shown)}]" if left else ""
    return "\n".join(shown) + end


def _listing(folder: int) -> str:
    with os.scandir(folder) as found:
        entries = sorted(
            f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
            for entry in found
            if not entry.is_symlink()
        )
    more = f"\n[{len(entries) - _MOST_ENTRIES} more]" if len(entries) > _MOST_ENTRIES else ""
    return "\n".join(entries[:_MOST_ENTRIES]) + more or "[an empty folder]"


def _words(error: OSError) -> str:
    if error.errno == errno.ELOOP:  # what O_NOFOLLOW says of a link
        return "links are not followed"
    return error.strerror or "unknown"
