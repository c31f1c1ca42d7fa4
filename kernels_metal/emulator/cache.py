"""Compiled programs on disk: found again by what they were made of, written whole or not at all."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LIMIT = 256 * 1024**2  # bytes


def folder() -> Path:
    """LOCALLLM_KERNEL_CACHE, else `metal-programs` where localllm keeps what it can make again."""
    if chosen := os.environ.get("LOCALLLM_KERNEL_CACHE"):
        return Path(chosen).expanduser()
    if home := os.environ.get("LOCALLLM_HOME"):
        return Path(home).expanduser() / "metal-programs"
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        cache = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
    return base / "localllm" / "metal-programs"


def kept(key: str, make: Callable[[Path], Path]) -> Path:
    """The file of this key. `make` builds it in a scratch folder beside, if there is none yet.

    Several processes may do so at once: the last to rename wins, and all have made the same.
    """
    home = folder()
    path = home / f"{key}.so"
    try:
        os.utime(path)  # its last use; the oldest go first
        return path
    except FileNotFoundError:
        pass
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="making-") as scratch:
        os.replace(make(Path(scratch)), path)
    _drop_oldest(home)
    return path


def _drop_oldest(home: Path) -> None:
    files = []
    for file in home.glob("*.so"):
        with suppress(FileNotFoundError):
            about = file.stat()
            files.append((about.st_mtime, about.st_size, file))
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= LIMIT:
            return
        file.unlink(missing_ok=True)  # a process that has it open keeps it
        total -= size
