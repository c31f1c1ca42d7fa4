"""Runs on disk: a folder each, found again by name.

RUN/                        (LOCALLLM_HOME/runs/NAME unless --out says otherwise)
  run.json                  what it is and how far it came
  config.toml               every setting, defaults filled in
  metrics.jsonl             losses and speeds, a line a step; answers drawn along the way
  checkpoints/              to resume from; see checkpoint.py
  adapter_config.json, adapter_model.safetensors     the result: the folder is a PEFT adapter
  model/                    the result of a full fine-tune: a model folder
  run.lock                  held while it trains

A run elsewhere leaves LOCALLLM_HOME/runs/NAME.path, which holds its place.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from localllm.adapters.dora_lengths import LENGTHS
from localllm.errors import InvalidRequest, StoreError
from localllm.files import replace_file
from localllm.hub.lock import try_lock
from localllm.hub.store import Store, folder_size
from localllm.train.metrics import read_metrics

_FACTS, _LOCK, _LINK = "run.json", "run.lock", ".path"
_MAX_FACTS = 1 << 20
DELIVERED = ("adapter_config.json", "adapter_model.safetensors", LENGTHS)


@dataclass(frozen=True)
class Run:
    """A run's folder and what its run.json says."""

    name: str
    folder: Path
    facts: Mapping[str, Any]

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def status(self) -> str:
        """As written, but that a run whose process is gone was "killed"."""
        status = str(self.facts.get("status", "unknown"))
        return "killed" if status == "running" and not in_use(self.folder) else status

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The metrics of a kind: "step", "eval", "start" …"""
        return [line for line in read_metrics(self.metrics) if line.get("type") == kind]

    def update(self, **changes: Any) -> Run:
        """The run with other facts, written for all to see."""
        facts = {**self.facts, **changes, "updated": _now()}
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        replace_file(self.folder / _FACTS, [text.encode()])
        return Run(self.name, self.folder, facts)


def runs_home() -> Path:
    return Store().home / "runs"


def create_run(out: str | None, facts: Mapping[str, Any]) -> Run:
    """A new run's folder; `out` may be there already if it holds no other run.

    Raises StoreError where nothing can be written, InvalidRequest where a run is.
    """
    home = runs_home()
    try:
        if out is None:
            folder = _new_folder(home, str(facts.get("model", "run")))
            name = folder.name
        else:
            refuse_run(out)
            folder = Path(out).expanduser().absolute()
            folder.mkdir(parents=True, exist_ok=True)
            inside = folder.parent == home.absolute()
            name = folder.name if inside else _link(home, folder)
        return Run(name, folder, {}).update(name=name, created=_now(), **facts)
    except OSError as error:
        where = error.filename or out or home
        raise StoreError(
            f"{where} cannot be written: {error.strerror or error}",
            hint="choose another place with --out, or set LOCALLLM_HOME",
        ) from error


def refuse_run(out: str) -> None:
    """Raises InvalidRequest where a run is."""
    folder = Path(out).expanduser().absolute()
    if (folder / _FACTS).exists():
        raise InvalidRequest(
            f"{folder} holds a run already",
            hint=f"go on with `localllm finetune --resume {out}`, delete it with "
            f"`localllm runs delete {out}`, or choose another --out",
        )


def open_run(named: str | Path) -> Run:
    """By folder, by name, or "last" for the newest. Raises InvalidRequest if there is none."""
    if str(named) == "last":
        found = all_runs()
        if not found:
            raise InvalidRequest("there is no run yet", hint="`localllm finetune` makes one")
        return found[0]
    folder = Path(named).expanduser()
    if (folder / _FACTS).is_file():
        return _read(folder.absolute())
    for run in all_runs():
        if run.name == str(named):
            return run
    raise InvalidRequest(
        f"there is no run {str(named)!r}", hint="`localllm runs` lists the runs that are"
    )


def all_runs() -> list[Run]:
    """Every run known here, newest first; damaged ones are left out."""
    home = runs_home()
    found = []
    if home.is_dir():
        for path in home.iterdir():
            folder = _followed(path) if path.suffix == _LINK else path
            if folder is not None and (folder / _FACTS).is_file():
                try:
                    run = _read(folder)
                except InvalidRequest:
                    continue
                found.append(Run(path.name.removesuffix(_LINK), folder, run.facts))
    return sorted(found, key=lambda run: str(run.facts.get("created", "")), reverse=True)


def delete_run(run: Run, *, keep_adapter: bool = False) -> int:
    """Frees a run's disk and returns the bytes. A folder of the user's own loses only our files.

    keep_adapter: what was trained stays. Raises InvalidRequest while the run is training.
    """
    if in_use(run.folder):
        raise InvalidRequest(f"{run.name} is training now", hint="stop it first (Ctrl-C)")
    before = folder_size(run.folder)
    ours = ["checkpoints", "metrics.jsonl", "config.toml", _LOCK, _FACTS]
    if not keep_adapter:
        ours = [*DELIVERED, "model", *ours]
    for name in ours:
        path = run.folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    left = folder_size(run.folder)
    if not any(run.folder.iterdir()):
        run.folder.rmdir()
    (runs_home() / f"{run.name}{_LINK}").unlink(missing_ok=True)
    return before - left


@contextmanager
def training(run: Run) -> Iterator[None]:
    """Keeps other processes from training the same run. Raises InvalidRequest if one does."""
    with try_lock(run.folder / _LOCK) as mine:
        if not mine:
            raise InvalidRequest(f"another process is training {run.name}")
        yield


def in_use(folder: Path) -> bool:
    lock = folder / _LOCK
    if not lock.exists():
        return False
    try:
        with try_lock(lock) as free:
            return not free
    except OSError:  # another user's
        return False


def _read(folder: Path) -> Run:
    path = folder / _FACTS
    try:
        if path.stat().st_size > _MAX_FACTS:
            raise ValueError("is too large")
        facts = json.loads(path.read_text("utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
    return Run(str(facts.get("name", folder.name)), folder, facts)


def _new_folder(home: Path, model: str) -> Path:
    """home/MODEL-1, MODEL-2 …: the first that is free."""
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", Path(model).name).strip("-.")[:40] or "run"
    home.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = home / f"{stem}-{number}"
        try:
            if not (home / f"{folder.name}{_LINK}").exists():
                folder.mkdir()
                return folder
        except FileExistsError:
            pass
        number += 1


def _link(home: Path, folder: Path) -> str:
    """Makes a run outside the store findable, under its folder's name or one like it."""
    home.mkdir(parents=True, exist_ok=True)
    stem, number = folder.name or "run", 1
    while True:
        name = stem if number == 1 else f"{stem}-{number}"
        link = home / f"{name}{_LINK}"
        if not (home / name).exists() and (not link.exists() or _followed(link) in (None, folder)):
            replace_file(link, [str(folder).encode()])
            return name
        number += 1


def _followed(link: Path) -> Path | None:
    """The folder a link names; None if no run is there any more."""
    try:
        folder = Path(link.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return folder if (folder / _FACTS).is_file() else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
