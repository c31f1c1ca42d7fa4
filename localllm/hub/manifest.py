"""What the store knows about a model it keeps: one small JSON file beside the model's own."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localllm.errors import StoreError

MANIFEST = "localllm.json"
_FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredFile:
    """A file of a model: path relative to the model's folder, bytes, sha256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`revision`: the commit or package version fetched. `pulled_at`: ISO 8601, UTC."""

    name: str
    source: str
    revision: str
    files: tuple[StoredFile, ...]
    pulled_at: str
    licence: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def write(self, folder: Path) -> None:
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """StoreError if the manifest in `folder` is missing, unreadable or makes no sense."""
        path = folder / MANIFEST
        try:
            return _parse(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise StoreError(f"{folder} has no {MANIFEST}") from error
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def _parse(data: Any) -> Manifest:
    if data["format"] != _FORMAT:
        raise ValueError(f"format {data['format']!r}, not {_FORMAT}")
    files = tuple(_file(**item) for item in data["files"])
    if not files:
        raise ValueError("no files")
    for key in ("name", "source", "revision", "pulled_at"):
        if not isinstance(data[key], str):
            raise TypeError(f"{key} is not text")
    licence = data.get("licence")
    return Manifest(
        name=data["name"],
        source=data["source"],
        revision=data["revision"],
        files=files,
        pulled_at=data["pulled_at"],
        licence=licence if isinstance(licence, str) else None,
    )


def _file(name: str, size: int, sha256: str) -> StoredFile:
    if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts:
        raise ValueError(f"{name!r} is not a file of the model")
    if type(size) is not int or size < 0:
        raise ValueError(f"{name}: size {size!r}")
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"{name}: not a sha256")
    return StoredFile(name, size, sha256)
