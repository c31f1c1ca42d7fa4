"""Files that are written whole or not at all, and read within bounds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from localllm.errors import InvalidRequest, StoreError

MOST_BYTES = 1 << 30  # of a file of chats


def write_whole(path: Path, parts: Iterable[str]) -> None:
    """Only its owner may read it. Raises StoreError."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror or error}", hint="choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def parsed(data: bytes | str, what: str) -> Any:
    """JSON. Raises InvalidRequest for what is none, and for what is nested beyond all reason."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InvalidRequest(f"{what} is no JSON that can be read: {reason}") from error
