"""The child's adapters: folders under names, and the weights they are asked for with."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

from localllm.errors import CheckpointError, InvalidRequest

# Adapters with a weight of their own are kept in memory, since no folder holds them.
MOST_WEIGHTED = 8
Stamp = tuple[tuple[str, int, int], ...]


class Loader(Protocol):
    """What of `LLM` is needed."""

    def load_adapter(
        self, path: str | Path, name: str | None = None, *, pin: bool = False, weight: float = 1.0
    ) -> str: ...

    def unload_adapter(self, name: str) -> None: ...


@dataclass(frozen=True)
class _Known:
    folder: Path
    stamp: Stamp


class Adapters:
    """Of one loaded model. Every method may be called from any thread, and may wait."""

    def __init__(self, llm: Loader) -> None:
        self._llm = llm
        self._lock = Lock()
        self._known: dict[str, _Known] = {}
        self._weighted: OrderedDict[tuple[str, float], str] = OrderedDict()

    @property
    def names(self) -> list[str]:
        return list(self._known)

    def load(self, path: str) -> str:
        """The name of the adapter in a folder: at once if it is known and has not changed.

        Two folders of one name get names apart; one that was trained anew takes the old one's place
        unless requests still use that. Raises what `LLM.load_adapter` raises.
        """
        folder = Path(path).expanduser().resolve()
        with self._lock:
            stamp = _stamp(folder)
            for name, known in list(self._known.items()):
                if known.folder == folder:
                    if known.stamp == stamp:
                        return name
                    with suppress(InvalidRequest):
                        self._unload(name)
            name = self._free_name(folder.name or "adapter")
            self._llm.load_adapter(folder, name)
            self._known[name] = _Known(folder, stamp)
            return name

    def unload(self, name: str) -> None:
        """Raises InvalidRequest while requests use it."""
        with self._lock:
            self._unload(name)

    def with_weight(self, name: str | None, weight: float) -> str | None:
        """What a request names to have so much of an adapter. name: a known one, or its folder."""
        if name is None or weight == 0:
            return None
        if name not in self._known:
            name = self.load(name)
        if weight == 1.0:
            return name
        with self._lock:
            key = name, float(weight)
            if key not in self._weighted:
                self._make_room()
                # The folder's: its content may have changed since, the name's digest says so.
                own = f"{name} x {weight:g}"
                self._llm.load_adapter(self._known[name].folder, own, weight=weight)
                self._weighted[key] = own
            self._weighted.move_to_end(key)
            return self._weighted[key]

    def _unload(self, name: str) -> None:
        for key, own in list(self._weighted.items()):
            if key[0] == name:
                self._llm.unload_adapter(own)
                del self._weighted[key]
        self._llm.unload_adapter(name)
        self._known.pop(name, None)

    def _make_room(self) -> None:
        for key, own in list(self._weighted.items()):
            if len(self._weighted) < MOST_WEIGHTED:
                return
            with suppress(InvalidRequest):  # requests use it: the next older one goes
                self._llm.unload_adapter(own)
                del self._weighted[key]

    def _free_name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._known:
            number += 1
            name = f"{wanted}-{number}"
        return name


def _stamp(folder: Path) -> Stamp:
    """Changes when the folder's files do. Raises CheckpointError for what is no folder."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        facts = [(path.name, path.stat()) for path in files]
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {error.strerror or error}",
            hint="Name the folder that holds adapter_config.json.",
        ) from error
    return tuple((name, fact.st_mtime_ns, fact.st_size) for name, fact in facts)
