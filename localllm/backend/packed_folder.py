"""The folder of packed weights: what lies in it, whose it is, and how it stays bounded.

KEY.packed      one model's weights as the native engine lays them out
KEY.uses        how often each of its experts was chosen, where these stay on disk
PLACE.source    the weight files it was made of, and what their content hashed to
*.part          being written, locked by its writer; without a lock what a killed one left
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from localllm.hub.lock import locked_part, remove_abandoned
from localllm.spec import DecoderSpec

FORM = 1  # raise it when the same files are packed to other weights than before
KEPT_MODELS = 4  # the least recently used go first
KEPT_BYTES = 64 << 30
RESERVE = 1 << 30  # bytes of disk that stay free
_KEPT_SOURCES = 256
_SETTLED = 2.0  # seconds; file systems date changes no finer than this


@dataclass(frozen=True)
class PackedPlace:
    """Where one model's packed weights are kept: the folder, and the weight files they are of."""

    folder: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Usage:
    """models: packed ones; nbytes: of everything in the folder, unfinished files included."""

    models: int
    nbytes: int


class PackedFolder:
    """No method but `writing` raises for a folder that is missing or cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def packed(self, key: str) -> Path:
        return self.path / f"{key}.packed"

    def uses(self, key: str) -> Path:
        return self.path / f"{key}.uses"

    def key(self, spec: DecoderSpec, files: Sequence[Path], build: str = "") -> str:
        """A name for what `files` pack to, from their content. Raises OSError.

        build: what packs them; another build may pack them otherwise.
        Hashes are remembered for as long as the files' size, times and inode stay.
        """
        from localllm import __version__

        look = self._look(files)
        digest = hashlib.sha256(f"{FORM} {__version__} {build} {spec!r}".encode())
        for entry in look.found:
            digest.update(entry.sha256.encode())
        key = digest.hexdigest()[:40]
        if look.news or key != _source_key(look.source):
            self._remember(look, key)
        return key

    def sha256s(self, files: Sequence[Path]) -> list[str]:
        """Of each file's content, in hex; remembered as in `key`. Raises OSError."""
        look = self._look(files)
        if look.news:  # so what was packed is of another content
            self._remember(look, "")
        return [entry.sha256 for entry in look.found]

    def _look(self, files: Sequence[Path]) -> _Look:
        files = [file.resolve() for file in files]
        place = hashlib.sha256(b"\0".join(map(os.fsencode, files))).hexdigest()[:40]
        source = self.path / f"{place}.source"
        known = _read_source(source)
        now = time.time()
        found = [_content(file, known) for file in files]
        # A file that changed just now may change again within the same time stamp.
        settled = all(now - entry.seen[2] / 1e9 > _SETTLED for entry in found)
        return _Look(source, found, found != list(known.values()), settled)

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """A file to write to; at the end it becomes the packed model of `key`. Raises OSError."""
        with self._replacing(self.packed(key)) as part:
            yield part

    def remember(self, key: str, past: Mapping[str, object]) -> None:
        """What a run leaves for later ones, beside the packed weights."""
        with contextlib.suppress(OSError), self._replacing(self.uses(key)) as part:
            part.write_text(json.dumps(past))

    @contextmanager
    def _replacing(self, target: Path) -> Iterator[Path]:
        self.path.mkdir(parents=True, exist_ok=True)
        handle, part = locked_part(self.path)
        try:
            yield part
            part.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        finally:
            os.close(handle)

    def used(self, key: str) -> None:
        """Marks a packed model as the most recently used."""
        with contextlib.suppress(OSError):
            os.utime(self.packed(key))

    def tidy(self) -> None:
        """Removes what killed writers left, and the oldest beyond what is kept."""
        for part in _listed(self.path, "*.part"):
            remove_abandoned(part)
        newest = _newest_first(_listed(self.path, "*.packed"))
        total = 0
        for number, path in enumerate(newest):
            total += _size(path)
            if number and (number >= KEPT_MODELS or total > KEPT_BYTES):
                _unlink(path)
        for path in _newest_first(_listed(self.path, "*.source"))[_KEPT_SOURCES:]:
            _unlink(path)
        for path in _listed(self.path, "*.uses"):
            if not self.packed(path.stem).exists():
                _unlink(path)

    def forget_removed(self) -> int:
        """Drops the packed form of models whose files are gone; returns the bytes freed."""
        freed, wanted = 0, set()
        for source in _listed(self.path, "*.source"):
            entries = _read_source(source)
            if entries and all(os.path.exists(path) for path in entries):
                wanted.add(_source_key(source))
            else:
                freed += _unlink(source)
        for path in _listed(self.path, "*.packed"):
            if path.stem not in wanted:
                freed += _unlink(path)
        self.tidy()
        return freed

    def size_of(self, model: Path) -> int:
        """Bytes of the packed forms of the model that is this file, or lies in this folder."""
        own = Path(os.path.realpath(model))
        keys = {
            _source_key(source)
            for source in _listed(self.path, "*.source")
            if any(own in (path, *path.parents) for path in map(Path, _read_source(source)))
        }
        return sum(_size(self.packed(key)) for key in keys if key)

    def obstacle(self, needed: int = 0) -> str | None:
        """Why another `needed` bytes could not be kept here; None if they could."""
        try:
            place = next(path for path in (self.path, *self.path.parents) if path.exists())
            if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
                return f"{place} cannot be written"
            free = shutil.disk_usage(place).free
        except OSError as error:
            return str(error)
        if free < needed + RESERVE:
            return f"{free >> 20} MiB are free on its disk, and {RESERVE >> 20} are to stay so"
        return None

    def usage(self) -> Usage:
        return Usage(
            len(_listed(self.path, "*.packed")), sum(_size(p) for p in _listed(self.path, "*"))
        )

    def _remember(self, look: _Look, key: str) -> None:
        found = look.found if look.settled else [entry.unsure() for entry in look.found]
        record = {"key": key, "files": [[e.path, e.seen, e.sha256] for e in found]}
        with contextlib.suppress(OSError), self._replacing(look.source) as part:
            part.write_text(json.dumps(record))


@dataclass(frozen=True)
class _Content:
    path: str
    seen: list[int]  # size, mtime, ctime, inode
    sha256: str

    def unsure(self) -> _Content:
        """As remembered when the next look has to hash again."""
        return _Content(self.path, [], self.sha256)


@dataclass(frozen=True)
class _Look:
    """What files hold. source: where that is remembered; news: whether something else was."""

    source: Path
    found: list[_Content]
    news: bool
    settled: bool


def _content(file: Path, known: dict[str, _Content]) -> _Content:
    status = file.stat()
    seen = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    before = known.get(str(file))
    if before is not None and before.seen == seen:
        return before
    with file.open("rb") as stream:
        return _Content(str(file), seen, hashlib.file_digest(stream, "sha256").hexdigest())


def _read_source(source: Path) -> dict[str, _Content]:
    try:
        files = json.loads(source.read_text())["files"]
        return {path: _Content(path, seen, sha256) for path, seen, sha256 in files}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _source_key(source: Path) -> str:
    try:
        return str(json.loads(source.read_text())["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _listed(folder: Path, pattern: str) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(folder.glob(pattern))
    return []


def _newest_first(paths: Sequence[Path]) -> list[Path]:
    ages = {}
    for path in paths:
        with contextlib.suppress(OSError):
            ages[path] = path.stat().st_mtime_ns
    return sorted(ages, key=lambda path: ages[path], reverse=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _unlink(path: Path) -> int:
    """Bytes freed; 0 if it cannot be removed or is gone already."""
    size = _size(path)
    try:
        path.unlink()
    except OSError:
        return 0
    return size
