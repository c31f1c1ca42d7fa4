"""Whose turn it is to drive the engine, when several threads could.

A plain lock would not do: the thread that lets it go between two steps takes it again before one
that waits wakes up, so that others starve; and a thread whose answer another one computes should
sleep until its answer has news, not until it gets the lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import Lock, get_ident


class _Turn:
    def __init__(self, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self.thread = get_ident()
        self.bell = Lock()
        self.bell.acquire()


class Turns:
    """One thread leads at a time; the others sleep until they need not lead, or it is their turn.

    Use `try: if take(…): … finally: give()`, so that an interrupt loses no turn.
    """

    def __init__(self) -> None:
        self._guard = Lock()  # of what follows, held for moments
        self._leader: _Turn | None = None
        self._urgent: deque[_Turn] = deque()
        self._waiting: deque[_Turn] = deque()

    @property
    def leading(self) -> bool:
        """Whether the calling thread leads."""
        leader = self._leader
        return leader is not None and leader.thread == get_ident()

    @property
    def wanted(self) -> bool:
        """Whether some thread cannot wait for more than the step under way."""
        return bool(self._urgent)

    def take(self, ready: Callable[[], bool], *, urgent: bool = False) -> bool:
        """Sleeps until this thread leads (True), or `ready` holds (False). Not to be nested.

        ready: called by other threads too; quick, and without locks.
        """
        turn = _Turn(ready)
        try:
            with self._guard:
                if ready():
                    return False
                if self._leader is None:
                    self._leader = turn
                else:
                    (self._urgent if urgent else self._waiting).append(turn)
            if self._leader is not turn:
                turn.bell.acquire()
        except BaseException:
            self._leave(turn)
            raise
        return self._leader is turn

    def take_free(self) -> bool:
        """Leads if that needs no waiting, not even for a moment."""
        if not self._guard.acquire(blocking=False):
            return False
        try:
            if self._leader is not None:
                return False
            self._leader = _Turn(lambda: True)
            return True
        finally:
            self._guard.release()

    def wake(self) -> None:
        """Wakes those who need not lead any more."""
        if self._waiting or self._urgent:
            with self._guard:
                self._wake()

    def give(self) -> None:
        """Lets another thread lead; nothing if this one does not."""
        if self.leading:
            with self._guard:
                self._pass_on()

    def _leave(self, turn: _Turn) -> None:
        with self._guard:
            for queue in (self._urgent, self._waiting):
                with suppress(ValueError):
                    queue.remove(turn)
            if self._leader is turn:
                self._pass_on()

    def _pass_on(self) -> None:
        self._wake()
        queue = self._urgent or self._waiting
        self._leader = queue.popleft() if queue else None
        if self._leader is not None:
            self._leader.bell.release()

    def _wake(self) -> None:
        for queue in (self._urgent, self._waiting):
            for turn in [turn for turn in queue if turn.ready()]:
                queue.remove(turn)
                turn.bell.release()
