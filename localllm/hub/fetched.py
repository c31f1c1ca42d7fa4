"""What a source hands back, and the checks every source's files pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from localllm.errors import DownloadError
from localllm.hub.catalog import KnownFile
from localllm.hub.manifest import StoredFile


@dataclass(frozen=True)
class Fetched:
    """Files lying in `folder`, complete and checked, ready to become a model."""

    folder: Path
    files: tuple[StoredFile, ...]
    revision: str
    licence: str | None = None


def check_pinned(known: tuple[KnownFile, ...], files: tuple[StoredFile, ...]) -> None:
    """DownloadError unless every pinned file is there with its size and sha256."""
    got = {file.name: file for file in files}
    for pin in known:
        file = got.get(pin.name)
        if file is None:
            raise DownloadError(f"the source no longer holds {pin.name}; it has {', '.join(got)}")
        if (file.size, file.sha256) != (pin.size, pin.sha256):
            raise DownloadError(
                f"{pin.name} is not the file that was promised: {file.size} bytes with sha256 "
                f"{file.sha256}, not {pin.size} with {pin.sha256}",
                hint="try again; if it stays so, the source has changed and is not to be trusted",
            )


def check_gguf(path: Path) -> None:
    """DownloadError unless the file begins as a GGUF does; error pages often do not."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise DownloadError(f"{path.name} is not a GGUF file: it begins with {magic!r}")
