"""Packed weights kept on disk, so that the next start reads them instead of packing again.

A cache is only ever a gain: when it cannot be read or written the backend packs as without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from localllm.backend.cpu_experts import Past, read_past
from localllm.backend.packed_folder import KEPT_BYTES, PackedFolder
from localllm.errors import StoreError
from localllm.kernels_cpu import _native
from localllm.spec import DecoderSpec


class PackedCache:
    """Packed models in `folder`, keyed by the content of their weight files.

    note: why the last `store` call packed anew or could not keep the result; None if all went
    well. hit: whether it found the weights packed. key: of the packed model last opened.
    """

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._folder = PackedFolder(folder)
        self._files = files
        self.note: str | None = None
        self.hit = False
        self.key: str | None = None

    def store(
        self, spec: DecoderSpec, pack: Callable[[], _native.WeightStore]
    ) -> _native.WeightStore:
        """The packed weights: read if they are here, else made by `pack` and kept."""
        self.note, self.hit = None, False
        try:
            key = self._folder.key(spec, self._files, native_build())
        except OSError as error:
            self.note = f"no cache of packed weights: {error}"
            return pack()
        self._folder.tidy()
        kept = self._kept(key, leave_experts=False)
        if kept is not None:
            return kept
        store = pack()
        self.note = self._keep(store, key) or self.note
        return store

    def in_file(self, spec: DecoderSpec, write: Callable[[Path], None]) -> _native.WeightStore:
        """The packed weights with a mixture's experts left in their file, which `write` makes
        unless it is here. Raises StoreError where it cannot be kept."""
        self.note, self.hit = None, False
        try:
            self.key = key = self._folder.key(spec, self._files, native_build())
            kept = self._kept(key, leave_experts=True)
            if kept is not None:
                return kept
            self._folder.tidy()
            # Packed weights take about as much as the files that they are made of.
            if obstacle := self._folder.obstacle(sum(file.stat().st_size for file in self._files)):
                raise OSError(obstacle)
            with self._folder.writing(key) as part:
                write(part)
            return _native.WeightStore.open(str(self._folder.packed(key)), leave_experts=True)
        except (OSError, RuntimeError) as error:
            raise StoreError(
                f"experts that memory does not hold are read from {self._folder.path}, and the "
                f"packed weights cannot be kept there: {error}",
                hint="free space on its disk, or set LOCALLLM_HOME to a folder on another",
            ) from error

    def _kept(self, key: str, *, leave_experts: bool) -> _native.WeightStore | None:
        """What is kept under this name; None, with a note if it is damaged, if it cannot be had."""
        path = self._folder.packed(key)
        try:
            store = _native.WeightStore.open(str(path), leave_experts=leave_experts)
        except RuntimeError as error:
            if path.exists():
                self.note = f"packed weights were made anew: {error}"
            return None
        self.hit = True
        self._folder.used(key)
        return store

    def past(self, experts: int) -> Past:
        """What earlier runs of a model with so many experts left."""
        return Past([]) if self.key is None else read_past(self._folder.uses(self.key), experts)

    def remember(self, past: Past) -> None:
        if self.key is not None:
            self._folder.remember(self.key, asdict(past))

    def _keep(self, store: _native.WeightStore, key: str) -> str | None:
        """Why the packed weights could not be kept; None if they were."""
        try:
            if store.nbytes > KEPT_BYTES:
                raise OSError(f"{store.nbytes >> 20} MiB are more than the cache may hold")
            if obstacle := self._folder.obstacle(store.nbytes):
                raise OSError(obstacle)
            with self._folder.writing(key) as part:
                store.save(str(part))
        except (OSError, RuntimeError) as error:
            return f"packed weights could not be kept in {self._folder.path}: {error}"
        self._folder.tidy()
        return None


def native_build() -> str:
    """Names the native module by its content: a change to how it packs needs no number raised."""
    return hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()
