"""A core for the app while its engine computes on all of them.

What the app has to do between two waits, such as drawing, it does at once and on a core of its own:
before that it says so in a page of memory that its engine's process has too, and the engine's
threads leave it one core (`kernels_cpu/core/lending.h`). Unasked it would push a thread of the
engine off in the middle of its work, and all others would wait for that one.
"""

from __future__ import annotations

import asyncio
import mmap
import selectors
import tempfile
import time
from typing import Any

APP, SERVER = 0, 1  # who may borrow one: the app, and what speaks with it in the engine's process
_BORROWERS = 2
_COMPUTING = _BORROWERS  # whether the engine's threads are at work
_LEAVE = 150e-6  # seconds until a thread of the engine has ended its piece of work and sleeps


class Cores:
    """The page. file: its descriptor, which a child inherits and makes its own `Cores` of."""

    def __init__(self, file: int | None = None) -> None:
        self._own = None
        if file is None:
            self._own = tempfile.TemporaryFile()  # noqa: SIM115  as long-lived as the page
            self._own.truncate(mmap.PAGESIZE)
            file = self._own.fileno()
        self.file = file
        self._page = mmap.mmap(file, mmap.PAGESIZE)

    @property
    def borrowers(self) -> memoryview:
        """A byte of each, not 0 while it borrows a core."""
        return memoryview(self._page)[:_BORROWERS]

    def lend(self) -> None:
        """From now on the threads of this process's engine leave cores to the borrowers."""
        from localllm import machine
        from localllm.sampling.native import native_module

        if (native := native_module()) is not None:
            native.lend_cores(self.borrowers, machine.cores().usable)

    def borrow(self, place: int) -> None:
        """Returns when a core is about to be free."""
        self._page[place] = True
        time.sleep(_LEAVE)

    def give_back(self, place: int) -> None:
        self._page[place] = False

    @property
    def computing(self) -> bool:
        return bool(self._page[_COMPUTING])

    @computing.setter
    def computing(self, computing: bool) -> None:
        self._page[_COMPUTING] = computing

    def run(self, main: Any, place: int) -> None:
        """`asyncio.run`, with a core borrowed whenever there is something to do."""

        def loop() -> asyncio.AbstractEventLoop:
            return asyncio.SelectorEventLoop(_Borrowing(self, place))

        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(main)


class _Borrowing(selectors.DefaultSelector):
    """Gives the core back for as long as it waits."""

    def __init__(self, cores: Cores, place: int) -> None:
        super().__init__()
        self._cores = cores
        self._place = place

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout <= 0:  # there is more to do already
            return super().select(timeout)
        self._cores.give_back(self._place)
        try:
            return super().select(timeout)
        finally:
            if self._cores.computing:
                self._cores.borrow(self._place)
