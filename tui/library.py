"""The models of this machine and of the catalog, and what can be done with them.

Reading a model's headers and removing it are left to the `localllm` command in a process of its
own: they take a while and import much, and the interface must not wait.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from localllm.errors import LocalLLMError

State = Literal["here", "damaged", "known"]
Fit = Literal["fits", "tight", "too large", "unknown"]
# Of memory that is free: beyond this a model leaves too little for anything else.
_TIGHT = 0.8
# What a model takes beside its weights: a full context of KV cache, a step, the process. Measured
# for the models at hand this is between 0.3 and 0.5 GB; larger ones take more.
_BESIDE = 400_000_000
_BESIDE_SHARE = 0.15
_TELL_EVERY = 0.1  # seconds


class CommandFailed(LocalLLMError):
    """A `localllm` command ended with an error, whose words these are."""


@dataclass(frozen=True)
class ModelRow:
    """A line of the models screen. size: bytes on disk, or to download where it is not here.

    needs: bytes of memory, None where nothing is known. exact: whether these are figures, not
    estimates.
    """

    name: str
    title: str
    state: State
    size: int | None
    parameters: int | None
    context: int | None
    licence: str
    needs: int | None
    exact: bool
    draft: str | None = None
    problem: str | None = None

    def fit(self, available: int) -> Fit:
        if self.needs is None or available <= 0:
            return "unknown"
        if self.needs > available:
            return "too large"
        return "tight" if self.needs > _TIGHT * available else "fits"


class Cancelled(Exception):
    """A pull was given up by the user; what has arrived is kept for the next."""


class Pull:
    """A pull under way, in a thread.

    on_change: called from that thread, a few times a second at most and once at the end. It may be
    set anew: the screen that shows a pull can be left and come back to.
    """

    def __init__(self, name: str, on_change: Callable[[Pull], None]) -> None:
        self.name = name
        self.label = "looking for it"
        self.done = 0
        self.total: int | None = None
        self.said: list[str] = []
        self.error: LocalLLMError | None = None
        self.finished = False
        self.cancelled = False
        self.on_change = on_change
        self._stop = threading.Event()
        self._told = 0.0

    def cancel(self) -> None:
        self._stop.set()

    # ---- hub.Progress, called by the thread

    def say(self, text: str) -> None:
        self._check()
        self.said.append(text)
        self.on_change(self)

    def update(self, label: str, done: int, total: int | None) -> None:
        self._check()
        self.label, self.done, self.total = label, done, total
        if time.monotonic() - self._told >= _TELL_EVERY:
            self._told = time.monotonic()
            self.on_change(self)

    def run(self) -> None:
        from localllm import hub

        try:
            hub.pull(self.name, progress=self)
        except Cancelled:
            self.cancelled = True
        except LocalLLMError as error:
            # A source that is given up because of the cancel is no error of its own.
            self.cancelled = self._stop.is_set()
            self.error = None if self.cancelled else error
        finally:
            self.finished = True
            self.on_change(self)

    def _check(self) -> None:
        if self._stop.is_set():
            raise Cancelled


class Library(Protocol):
    """What the models screen works with; tests have one of their own.

    pulling: the pull under way, or None. It outlives the screen.
    """

    pulling: Pull | None

    def rows(self) -> list[ModelRow]: ...

    def available(self) -> int:
        """Bytes that a model may use now."""
        ...

    def pull(self, name: str, on_change: Callable[[Pull], None]) -> Pull: ...

    async def details(self, name: str) -> list[tuple[str, str]]: ...

    async def plan(self, name: str) -> dict[str, Any]: ...

    async def remove(self, name: str) -> str: ...


class HubLibrary:
    """The store and the catalog."""

    def __init__(self) -> None:
        self.pulling: Pull | None = None

    def rows(self) -> list[ModelRow]:
        """What is here first, then the rest of the catalog; damaged models by their folder."""
        from localllm import hub
        from localllm.hub.store import Store

        catalog = hub.load_catalog()
        rows, here = [], set()
        for kept in Store().kept():
            name = kept.manifest.name if kept.manifest else kept.folder.name
            entry = catalog.get(name)
            size = kept.size
            here.add(entry.name if entry else name)
            rows.append(
                ModelRow(
                    name,
                    entry.title if entry else (kept.manifest.source if kept.manifest else ""),
                    "damaged" if kept.problem else "here",
                    size,
                    entry.parameters if entry else None,
                    entry.context if entry else None,
                    (kept.manifest.licence if kept.manifest else None) or "not stated",
                    _needs(size),
                    True,
                    entry.draft if entry else None,
                    kept.problem,
                )
            )
        for entry in catalog:
            if entry.name not in here:
                download = entry.sources[0].download_bytes
                rows.append(
                    ModelRow(
                        entry.name,
                        entry.title,
                        "known",
                        download,
                        entry.parameters,
                        entry.context,
                        entry.licence,
                        None if download is None else _needs(download),
                        entry.sources[0].exact,
                        entry.draft,
                    )
                )
        return rows

    def available(self) -> int:
        from localllm.machine import memory

        return memory().available

    def pull(self, name: str, on_change: Callable[[Pull], None]) -> Pull:
        self.pulling = Pull(name, on_change)
        threading.Thread(target=self.pulling.run, name=f"pull {name}", daemon=True).start()
        return self.pulling

    async def details(self, name: str) -> list[tuple[str, str]]:
        """The lines of `localllm show`."""
        text = await run_localllm("show", name)
        lines = (line for line in text.splitlines() if line.strip())
        return [(line[:15].strip(), line[15:].strip()) for line in lines]

    async def plan(self, name: str) -> dict[str, Any]:
        """What `localllm plan --json` tells; its exit code 1 says that the model does not fit."""
        found = json.loads(await run_localllm("plan", name, "--json", accept=(0, 1)))
        assert isinstance(found, dict)
        return found

    async def remove(self, name: str) -> str:
        return (await run_localllm("rm", name, "--yes")).strip()


def _needs(weights: int) -> int:
    return weights + max(_BESIDE, int(weights * _BESIDE_SHARE))


def command(*arguments: str) -> list[str]:
    """The `localllm` of this very installation."""
    return [sys.executable, "-c", "from localllm.cli import main; main()", *arguments]


async def run_localllm(*arguments: str, accept: tuple[int, ...] = (0,), seconds: float = 60) -> str:
    """What a command printed. Raises CommandFailed with its error, or when it takes too long."""
    process = await asyncio.create_subprocess_exec(
        *command(*arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), seconds)
    except (TimeoutError, asyncio.CancelledError) as error:
        process.kill()
        await process.wait()
        if isinstance(error, asyncio.CancelledError):
            raise
        raise CommandFailed(f"`localllm {arguments[0]}` took more than {seconds:.0f} s") from error
    if process.returncode not in accept or (process.returncode and not out.strip()):
        first, _, rest = err.decode(errors="replace").strip().partition("\n")
        message = first.removeprefix("localllm: ") or f"`localllm {arguments[0]}` failed"
        raise CommandFailed(message, hint=rest.strip() or None)
    return out.decode(errors="replace")
