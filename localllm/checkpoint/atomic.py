"""Small files written all or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from localllm.errors import CheckpointError


def write_bytes(path: Path, content: bytes) -> None:
    """`path` holds the old content until the new one is on the disk.

    Raises CheckpointError where it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """With an indent, keys in their order; raises what `write_bytes` raises."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
