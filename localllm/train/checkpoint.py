"""Checkpoints of a run: whole or not there, checked when read, written behind the run's back.

RUN/checkpoints/
  step-00000100/   appears by a rename once every byte is on the disk
    state.json       where the run is: step, losses, place in the metrics, what it trains on
    NAME.npy         the parameters and the optimizer's state
    manifest.json    sha256 of each of these
  .part-…          one being written, or what a killed run left; swept at the next start
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localllm.errors import CheckpointError, StoreError
from localllm.hub.disk import sync

_MANIFEST, _STATE = "manifest.json", "state.json"
_MAX_JSON_BYTES = 16 << 20
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps. step: steps done; facts: what JSON holds, exactly as it was."""

    step: int
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]


class Checkpoints:
    """Those of one run. One writer at a time; a thread of its own does the writing.

    What goes wrong with a write is kept for `problems`, not raised: the run goes on, and the
    checkpoint before is intact.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._problems: list[StoreError] = []

    def save(self, snapshot: Snapshot, *, best: int | None) -> None:
        """Begins to write `snapshot`, whose arrays nobody may change; waits for the one before.

        best: the step of the checkpoint that is kept however old it is.
        """
        self.wait()
        self._pending = self._writer.submit(self._write, snapshot, best)

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except OSError as error:
                self._problems.append(_told(error, self.folder))

    def problems(self) -> list[StoreError]:
        """What went wrong since the last call, of writes that are over."""
        if self._pending is not None and self._pending.done():
            self.wait()
        found, self._problems = self._problems, []
        return found

    def close(self) -> None:
        self.wait()
        self._writer.shutdown()

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, ascending; whether they are sound is not asked."""
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdigit())

    def newest(self) -> tuple[Snapshot | None, list[str]]:
        """The newest sound checkpoint, and what was wrong with newer ones."""
        complaints: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.read(step), complaints
            except CheckpointError as error:
                complaints.append(str(error))
        return None, complaints

    def read(self, step: int) -> Snapshot:
        """Raises CheckpointError if any byte is not what was written."""
        folder = self._place(step)
        listed = _json(folder / _MANIFEST)
        if not all(isinstance(value, str) for value in listed.values()) or _STATE not in listed:
            raise CheckpointError(f"{folder / _MANIFEST}: lists no files and their sha256")
        for name, expected in listed.items():
            if name != Path(name).name or _sha256(folder / name) != expected:
                raise CheckpointError(
                    f"the checkpoint {folder} is damaged: {name} is not what was written"
                )
        state = _json(folder / _STATE)
        arrays = {
            Path(name).stem: np.load(folder / name, allow_pickle=False)
            for name in listed
            if name.endswith(".npy")
        }
        if state.get("step") != step or not isinstance(state.get("facts"), dict):
            raise CheckpointError(f"{folder / _STATE} is not about step {step}")
        return Snapshot(step, arrays, state["facts"])

    def drop_after(self, step: int) -> None:
        """Forgets newer ones, which the run is about to make again (or which are damaged)."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self._place(later), ignore_errors=True)

    def sweep(self) -> None:
        """Removes what killed runs left half-written."""
        if self.folder.is_dir():
            for path in self.folder.glob(".part-*"):
                shutil.rmtree(path, ignore_errors=True)

    # ---- in the writing thread

    def _write(self, snapshot: Snapshot, best: int | None) -> None:
        part = self.folder / f".part-{uuid.uuid4().hex}"
        place = self._place(snapshot.step)
        try:
            part.mkdir(parents=True)
            digests = {
                f"{name}.npy": _write_array(part / f"{name}.npy", array)
                for name, array in snapshot.arrays.items()
            }
            state = {"step": snapshot.step, "facts": dict(snapshot.facts)}
            digests[_STATE] = _write_json(part / _STATE, state)
            _write_json(part / _MANIFEST, digests)
            sync(part)
            if place.exists():  # of a run that was resumed before it
                shutil.rmtree(place)
            part.rename(place)
            sync(self.folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        self._prune(best)

    def _prune(self, best: int | None) -> None:
        steps = self.steps()
        for step in steps[: -self.keep]:
            if step != best:
                shutil.rmtree(self._place(step), ignore_errors=True)

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def _write_array(path: Path, array: np.ndarray) -> str:
    """As np.save would, without its copies; gives the sha256."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    assert array.flags.c_contiguous, "the header says the order of C"
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for data in (memoryview(header.getvalue()), array.reshape(-1).view(np.uint8).data):
            for start in range(0, len(data), _BLOCK):
                block = data[start : start + _BLOCK]
                digest.update(block)
                if file.write(block) != len(block):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_json(path: Path, tree: Mapping[str, Any]) -> str:
    data = json.dumps(tree, ensure_ascii=False, indent=1).encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is too large to be what it should be")
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return tree


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _told(error: OSError, folder: Path) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"the disk is full: no checkpoint could be written to {folder}",
            hint="free some space; the checkpoint before is intact, and the next one is tried as "
            "planned",
        )
    return StoreError(f"no checkpoint could be written to {folder}: {error.strerror or error}")
