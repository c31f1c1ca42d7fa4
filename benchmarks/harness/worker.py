"""An object in a process of its own, so that neither side's memory or threads touch the other's.

with Worker(Ours, path, threads=1) as ours:
    seconds = ours.decode(128, 16)
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

_CLOSE_SECONDS = 5


class Worker:
    """Makes `factory(*args, **kwargs)` in a new process; its methods are called by name.

    What the factory or a method raises is raised here. `start` and `result` are one call in two
    halves, for work that runs in two processes at once.
    """

    def __init__(self, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, factory, args, kwargs), daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self.result()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def start(self, name: str, *args: Any) -> None:
        self._connection.send((name, args))

    def result(self) -> Any:
        try:
            error, value = self._connection.recv()
        except EOFError:
            self._process.join(_CLOSE_SECONDS)
            code = self._process.exitcode
            raise RuntimeError(f"a measuring process ended early, exit code {code}") from None
        if error is not None:
            raise error
        return value

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            self.start(name, *args)
            return self.result()

        return call

    def close(self) -> None:
        self._connection.close()
        self._process.join(_CLOSE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _serve(
    connection: Connection, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
) -> None:
    target = None

    def make() -> None:
        nonlocal target
        target = factory(*args, **kwargs)

    action: Callable[[], Any] = make
    while True:
        try:
            answer = (None, action())
        except Exception as error:
            answer = (error, None)
        try:
            connection.send(answer)
            if target is None:
                return
            name, arguments = connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        action = _bound(target, name, arguments)


def _bound(target: Any, name: str, arguments: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: getattr(target, name)(*arguments)
