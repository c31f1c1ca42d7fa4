"""Files that are written whole or not at all, and read within bounds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from localllm.errors import InvalidRequest, StoreError
from localllm.files import replace_file

MOST_BYTES = 1 << 30  # of a file of chats


def write_whole(path: Path, parts: Iterable[str]) -> None:
    """Only its owner may read it. Raises StoreError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (part.encode("utf-8", "replace") for part in parts), mode=0o600)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror or error}", hint="choose another folder"
        ) from error


def parsed(data: bytes | str, what: str) -> Any:
    """JSON. Raises InvalidRequest for what is none, and for what is nested beyond all reason."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InvalidRequest(f"{what} is no JSON that can be read: {reason}") from error
