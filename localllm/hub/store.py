"""The folder that keeps pulled models.

LOCALLLM_HOME/
  models/KEY/      one finished model and its manifest; appears by a rename, complete or not
  partial/KEY/     a pull under way, or what a dead one left behind to resume from
  locks/KEY.lock   held by the process that pulls or removes the model
  trash/           removed models on their way out
  packed/          weights as the cpu backend lays them out; see backend/packed_folder.py
  metal/           which Metal kernels were measured faster; see kernels_metal/dispatch.py
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from localllm.errors import StoreError
from localllm.hub.disk import ELSEWHERE, sync, telling_os_errors
from localllm.hub.lock import file_lock, try_lock
from localllm.hub.manifest import MANIFEST, Manifest, StoredFile

KEEP_PARTIAL = 7 * 24 * 3600  # seconds an interrupted pull can be resumed before it is swept
SCRATCH = "tmp"  # inside a partial pull: never resumed, swept as soon as its process is dead
_NAME = "name"  # in a partial pull: the model's name
_BLOCK = 1 << 20


class DamagedModelError(StoreError):
    """A kept model whose files are not what its manifest says; pulling again repairs it."""


@dataclass(frozen=True)
class Kept:
    """A folder in the store. `problem` says why it cannot be used, if it cannot."""

    folder: Path
    manifest: Manifest | None
    problem: str | None = None

    @property
    def size(self) -> int:
        """Bytes on disk, whatever state the model is in."""
        return folder_size(self.folder)


def default_home() -> Path:
    """LOCALLLM_HOME, else the platform's cache folder."""
    if home := os.environ.get("LOCALLLM_HOME"):
        try:
            return Path(home).expanduser().absolute()
        except RuntimeError as error:
            raise StoreError(f"LOCALLLM_HOME={home}: {error}", hint=ELSEWHERE) from error
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "localllm"
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification asks to ignore relative paths.
    base = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
    return base / "localllm"


def store_key(name: str) -> str:
    """A folder name for a model name: readable, and different for different names even where
    the file system ignores case."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:80].strip("._")
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class Store:
    """Reading needs no write permission; only pulls and removals create folders."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or default_home()

    def folder(self, name: str) -> Path:
        return self.home / "models" / store_key(name)

    @property
    def packed(self) -> Path:
        return self.home / "packed"

    def partial(self, name: str) -> Path:
        return self.home / "partial" / store_key(name)

    def find(self, name: str) -> Manifest | None:
        """The manifest of a model that is here whole (sizes checked), or None.

        Raises DamagedModelError when something is here that cannot be used.
        """
        folder = self.folder(name)
        try:
            if not folder.exists():
                return None
        except OSError as error:
            raise StoreError(
                f"{folder} cannot be read: {error.strerror or error}", hint=ELSEWHERE
            ) from error
        again = f"run `localllm pull {name}` to fetch it again"
        try:
            manifest = Manifest.read(folder)
        except StoreError as error:
            raise DamagedModelError(str(error), hint=again) from error
        if manifest.name != name:
            raise DamagedModelError(f"{folder / MANIFEST} is about {manifest.name!r}", hint=again)
        for file in manifest.files:
            if problem := _size_problem(folder / file.name, file):
                raise DamagedModelError(f"the stored {name} is damaged: {problem}", hint=again)
        return manifest

    def verify(self, manifest: Manifest, update: Callable[[int], None]) -> None:
        """Read every file and compare its sha256; `update` gets the bytes read so far.

        Raises DamagedModelError naming the first file that differs.
        """
        done = 0
        folder = self.folder(manifest.name)
        for file in manifest.files:

            def report(count: int, before: int = done) -> None:
                update(before + count)

            digest = hash_file(folder / file.name, report)
            if digest != file.sha256:
                raise DamagedModelError(
                    f"the stored {manifest.name} is damaged: {folder / file.name} has sha256 "
                    f"{digest}, not {file.sha256}",
                    hint=f"run `localllm pull {manifest.name}` to fetch it again",
                )
            done += file.size

    def kept(self) -> list[Kept]:
        """Every folder under models/, sound or not, by name."""
        found = []
        for folder in _folders(self.home / "models"):
            manifest, problem = None, None
            try:
                manifest = Manifest.read(folder)
                if store_key(manifest.name) == folder.name:
                    self.find(manifest.name)
                else:
                    problem = f"{folder / MANIFEST} is about {manifest.name!r}"
            except StoreError as error:
                problem = str(error)
            found.append(Kept(folder, manifest, problem))
        return sorted(found, key=lambda kept: kept.manifest.name if kept.manifest else "~")

    @contextmanager
    def pulling(self, name: str, on_wait: Callable[[], None]) -> Iterator[Path]:
        """Hold the model's lock; yields the folder to work in. Sweeps what dead pulls left."""
        with ExitStack() as held:
            with telling_os_errors(self.home):
                for part in ("models", "partial", "locks", "trash"):
                    (self.home / part).mkdir(parents=True, exist_ok=True)
                held.enter_context(file_lock(self._lock(name), on_wait))
                self._sweep(name)
                work = self.partial(name)
                work.mkdir(exist_ok=True)
                (work / _NAME).write_text(name, encoding="utf-8")
            try:
                yield work
            finally:
                _drop_if_empty(work)

    def commit(self, staged: Path, manifest: Manifest) -> None:
        """Make the files in `staged` the model, in one rename, and drop the partial folder.

        The caller holds the lock. Files are on disk before the model can be seen.
        """
        with telling_os_errors(self.home):
            manifest.write(staged)
            for path in sorted(staged.rglob("*"), reverse=True):
                sync(path)
            sync(staged)
            target = self.folder(manifest.name)
            if target.exists():
                self._discard(target)
            os.rename(staged, target)
            sync(target.parent)
        shutil.rmtree(self.partial(manifest.name), ignore_errors=True)

    def remove(self, name: str) -> int:
        """Delete a model and whatever an interrupted pull of it left; returns bytes freed.

        Waits for a pull of the same model that is under way. 0 means there was nothing.
        """
        if self.size(name) == 0:
            return 0
        with self.pulling(name, on_wait=lambda: None), telling_os_errors(self.home):
            freed = self.size(name)
            for path in (self.folder(name), self.partial(name)):
                if path.exists():
                    self._discard(path)
        return freed

    def size(self, name: str) -> int:
        """Bytes of a model and of an interrupted pull of it; 0 if there is nothing."""
        return folder_size(self.folder(name)) + _partial_size(self.partial(name))

    def remove_folder(self, folder: Path) -> int:
        """Delete a folder of `kept()` whose manifest names no model; returns bytes freed."""
        freed = folder_size(folder)
        with telling_os_errors(self.home):
            (self.home / "trash").mkdir(exist_ok=True)
            self._discard(folder)
        return freed

    def unfinished(self) -> list[tuple[str, int]]:
        """(name, bytes) of pulls that were interrupted or are under way."""
        found = []
        for folder in _folders(self.home / "partial"):
            try:
                found.append(((folder / _NAME).read_text(encoding="utf-8"), _partial_size(folder)))
            except (OSError, UnicodeDecodeError):
                continue
        return sorted(found)

    def _lock(self, name: str) -> Path:
        return self.home / "locks" / f"{store_key(name)}.lock"

    def _discard(self, folder: Path) -> None:
        """Out of sight by one rename, then deleted; a kill in between leaves only trash."""
        gone = self.home / "trash" / f"{folder.name}.{uuid.uuid4().hex[:8]}"
        os.rename(folder, gone)
        shutil.rmtree(gone)

    def _sweep(self, own: str) -> None:
        """Delete trash, and of other models' dead pulls the scratch and what is too old."""
        for folder in _folders(self.home / "trash"):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in _folders(self.home / "partial"):
            if folder.name == store_key(own):
                continue  # ours to resume
            try:
                with try_lock(self.home / "locks" / f"{folder.name}.lock") as dead:
                    if not dead:
                        continue
                    for scratch in folder.rglob(SCRATCH):
                        shutil.rmtree(scratch, ignore_errors=True)
                    # Written anew by every pull, so its age is that of the last try.
                    if time.time() - (folder / _NAME).stat().st_mtime > KEEP_PARTIAL:
                        shutil.rmtree(folder, ignore_errors=True)
            except OSError:
                continue  # sweeping is a courtesy; the pull at hand goes on


def hash_file(path: Path, update: Callable[[int], None] = lambda done: None) -> str:
    """sha256 in hex; `update` gets the bytes read so far. Raises StoreError."""
    digest, done = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                done += len(block)
                update(done)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def folder_size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue  # deleted meanwhile
    return total


def _partial_size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != _NAME)


def _drop_if_empty(work: Path) -> None:
    """A pull that ended without fetching anything leaves nothing to resume."""
    if work.is_dir() and _partial_size(work) == 0:
        shutil.rmtree(work, ignore_errors=True)


def _folders(parent: Path) -> list[Path]:
    """Sub-folders, or none if `parent` is not there. StoreError if it cannot be listed."""
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(
            f"{parent} cannot be read: {error.strerror or error}", hint=ELSEWHERE
        ) from error


def _size_problem(path: Path, file: StoredFile) -> str | None:
    try:
        size = path.stat().st_size
    except OSError:
        return f"{path} is missing"
    return None if size == file.size else f"{path} has {size} bytes, not {file.size}"
