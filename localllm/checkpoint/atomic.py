"""Files of a model written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from localllm.errors import CheckpointError
from localllm.files import replace_file


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """As `replace_file`. Raises CheckpointError where it cannot be written."""
    try:
        replace_file(path, parts)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Raises what `write_parts` raises."""
    write_parts(path, [content])


def write_json(path: Path, value: Any) -> None:
    """With an indent, keys in their order; raises what `write_parts` raises."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
