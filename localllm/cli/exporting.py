"""What `fuse` and `export` share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from localllm.errors import InvalidRequest

if TYPE_CHECKING:
    from localllm.export import Kept

_DTYPES: dict[str, Kept] = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_MAX_TEXT = 16 << 20


def dtype_named(name: str) -> Kept:
    if name not in _DTYPES:
        raise InvalidRequest(f"no type {name!r}", hint=f"types: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TEXT:
            raise InvalidRequest(f"{path}: more than {_MAX_TEXT >> 20} MiB of text")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: cannot be read: {error}") from error


def to_megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


@contextmanager
def bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the standard error, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
