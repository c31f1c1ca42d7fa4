"""Which adapters are loaded: on demand, within a number of slots and of bytes, idle ones first out.

    register -> acquire … release -> evicted when room is needed -> acquire loads it again

Not for several threads at once: the engine's own calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from localllm.adapters import LoraAdapter, load_adapter
from localllm.errors import CheckpointError, InvalidRequest, OutOfMemoryPlan
from localllm.spec import DecoderSpec

Load = Callable[[Path, DecoderSpec], LoraAdapter]


class AdapterBackend(Protocol):
    """What of a backend is needed here; see `Backend`."""

    spec: DecoderSpec

    def add_adapter(self, adapter: LoraAdapter) -> int: ...
    def remove_adapter(self, index: int) -> None: ...
    def adapter_bytes(self, adapter: LoraAdapter) -> int: ...


class AdaptersBusy(OutOfMemoryPlan):
    """No room for one more adapter until a request that uses another has ended."""


@dataclass
class _Entry:
    """adapter: kept while there is no path to read it from again."""

    digest: bytes
    nbytes: int
    path: Path | None
    adapter: LoraAdapter | None
    index: int | None = None
    users: int = 0
    pinned: bool = False
    used_at: int = 0

    @property
    def idle(self) -> bool:
        return self.index is not None and not self.users and not self.pinned


class AdapterSlots:
    """max_adapters: how many are loaded at a time, at most as many as the backend has slots.

    max_bytes: what the loaded ones may take together.
    """

    def __init__(
        self,
        backend: AdapterBackend,
        *,
        max_adapters: int,
        max_bytes: int,
        load: Load = load_adapter,
    ) -> None:
        if max_adapters < 0:
            raise InvalidRequest(f"max_adapters must be at least 0, not {max_adapters}")
        self._backend = backend
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes
        self._load = load
        self._entries: dict[str, _Entry] = {}
        self._clock = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The registered ones, loaded or not."""
        return tuple(self._entries)

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(name for name, entry in self._entries.items() if entry.index is not None)

    @property
    def loaded_bytes(self) -> int:
        return sum(e.nbytes for e in self._entries.values() if e.index is not None)

    def register(self, adapter: LoraAdapter, path: Path | None = None) -> None:
        """Makes an adapter known by its name; it is loaded when it is first acquired.

        path: its folder, from which it is read whenever it is loaded; None keeps the adapter itself
        in memory. Raises InvalidRequest where the name stands for another adapter, OutOfMemoryPlan
        for one that could never be loaded.
        """
        known = self._entries.get(adapter.name)
        if known is not None:
            if known.digest != adapter.digest:
                raise InvalidRequest(
                    f"there is another adapter by the name {adapter.name!r}",
                    hint="give it another name, or unregister the other one first",
                )
            return
        nbytes = self._backend.adapter_bytes(adapter)
        if not self._max_adapters:
            raise OutOfMemoryPlan("no adapters are allowed", hint="raise `max_adapters`")
        if nbytes > self._max_bytes:
            raise OutOfMemoryPlan(
                f"adapter {adapter.name!r} takes {nbytes} bytes of the {self._max_bytes} allowed",
                hint="raise `max_adapter_bytes`",
            )
        kept = adapter if path is None else None
        self._entries[adapter.name] = _Entry(adapter.digest, nbytes, path, kept)

    def unregister(self, name: str) -> None:
        """Forgets an adapter. Raises InvalidRequest while requests use it."""
        entry = self._entry(name)
        if entry.users:
            raise InvalidRequest(f"adapter {name!r} is used by {entry.users} request(s)")
        self._evict(entry)
        del self._entries[name]

    def path(self, name: str) -> Path | None:
        """The folder it is read from, None for one that is kept in memory."""
        return self._entry(name).path

    def digest(self, name: str) -> bytes:
        """Of the adapter's content: part of the key of every KV block computed with it."""
        return self._entry(name).digest

    def busy_for(self, name: str) -> bool:
        """Whether `acquire` would find no room now; not so for a name that is unknown."""
        entry = self._entries.get(name)
        return entry is not None and self._victims(entry) is None

    def acquire(self, name: str) -> int:
        """The backend's index of the adapter, which stays loaded until `release`.

        Raises InvalidRequest for an unknown name, AdaptersBusy when there is no room now, and what
        reading it again raises (CheckpointError also where its folder has changed).
        """
        entry = self._entry(name)
        index = self._load_entry(name, entry)
        entry.users += 1
        return index

    def release(self, name: str) -> None:
        """One request fewer uses it; when idle it stays until another needs the room."""
        entry = self._entry(name)
        assert entry.users > 0, f"adapter {name!r} was released more often than acquired"
        entry.users -= 1
        self._touch(entry)

    def pin(self, name: str) -> int:
        """Loads an adapter, never to be evicted; raises as `acquire` does."""
        entry = self._entry(name)
        index = self._load_entry(name, entry)
        entry.pinned = True
        return index

    def unpin(self, name: str) -> None:
        self._entry(name).pinned = False

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            known = ", ".join(sorted(self._entries)) or "none"
            raise InvalidRequest(f"there is no adapter {name!r}", hint=f"registered: {known}")
        return self._entries[name]

    def _load_entry(self, name: str, entry: _Entry) -> int:
        if entry.index is None:
            victims = self._victims(entry)
            if victims is None:
                raise self._busy(name)
            adapter = self._content(name, entry)  # before anything is evicted: it may fail
            for victim in victims:
                self._evict(victim)
            entry.index = self._backend.add_adapter(adapter)
        self._touch(entry)
        return entry.index

    def _victims(self, wanted: _Entry) -> list[_Entry] | None:
        """What must go so that `wanted` fits, least recently used first; None if it cannot."""
        if wanted.index is not None:
            return []
        idle = sorted((e for e in self._entries.values() if e.idle), key=lambda e: e.used_at)
        count, nbytes = len(self.loaded), self.loaded_bytes
        victims: list[_Entry] = []
        while count >= self._max_adapters or nbytes + wanted.nbytes > self._max_bytes:
            if len(victims) == len(idle):
                return None
            victims.append(idle[len(victims)])
            count, nbytes = count - 1, nbytes - victims[-1].nbytes
        return victims

    def _busy(self, name: str) -> AdaptersBusy:
        used = ", ".join(repr(n) for n in self.loaded if not self._entries[n].idle)
        slots = len(self.loaded) >= self._max_adapters
        limit = (
            f"all {self._max_adapters} adapter slots are taken"
            if slots
            else f"the loaded adapters take {self.loaded_bytes} of {self._max_bytes} bytes"
        )
        return AdaptersBusy(
            f"no room for adapter {name!r}: {limit}, in use or pinned: {used}",
            hint=f"wait for a request to end, unpin one, or raise "
            f"`{'max_adapters' if slots else 'max_adapter_bytes'}`",
        )

    def _content(self, name: str, entry: _Entry) -> LoraAdapter:
        if entry.adapter is not None:
            return entry.adapter
        assert entry.path is not None
        adapter = self._load(entry.path, self._backend.spec)
        if adapter.digest != entry.digest:
            raise CheckpointError(
                f"{entry.path}: the adapter {name!r} has changed since it was registered",
                hint="unregister it and register it again",
            )
        return adapter

    def _evict(self, entry: _Entry) -> None:
        if entry.index is not None:
            self._backend.remove_adapter(entry.index)
            entry.index = None
        entry.pinned = False

    def _touch(self, entry: _Entry) -> None:
        self._clock += 1
        entry.used_at = self._clock
