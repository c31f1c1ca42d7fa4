"""A terminal of our own for the real command: pexpect runs it, pyte draws what it writes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import pexpect
import pyte

_STEADY = 0.3  # seconds
COMMAND = "from localllm.cli import main; main()"


class Terminal:
    """`localllm ARGUMENTS` with its chats and settings in `home`, models where they are."""

    def __init__(self, home: Path, *arguments: str, columns: int = 110, lines: int = 34) -> None:
        environment = {
            **os.environ,
            "XDG_DATA_HOME": str(home / "data"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "HOME": str(home) if sys.platform == "darwin" else os.environ.get("HOME", str(home)),
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
            "LOCALLLM_NO_PACKED_CACHE": "1",
        }
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.process = pexpect.spawn(
            sys.executable,
            ["-c", COMMAND, *arguments],
            dimensions=(lines, columns),
            env=environment,  # type: ignore[arg-type]
            timeout=30,
        )

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    def read(self, seconds: float = 0.05) -> None:
        try:
            data = self.process.read_nonblocking(1 << 16, timeout=seconds)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return
        # pyte knows no private modes with "<" and ">", and would show what follows them.
        self._stream.feed(data.replace(b"\x1b[>25u", b"").replace(b"\x1b[<u", b""))

    def until(self, what: str | Callable[[str], bool], seconds: float = 60) -> None:
        """Reads until the text is on the screen, or the condition holds for it, and stays so: a
        frame that is half drawn shows what never was."""
        end, since = time.monotonic() + seconds, None
        while since is None or time.monotonic() - since < _STEADY:
            holds = what in self.text if isinstance(what, str) else what(self.text)
            since = None if not holds else since or time.monotonic()
            assert time.monotonic() < end, f"{what!r} did not come:\n{self.text}"
            self.read()

    def type(self, text: str) -> None:
        self.process.send(text)

    def kill(self) -> None:
        """As `kill -9` does."""
        self.process.kill(9)
        self.process.wait()

    def leave(self) -> int:
        """Ctrl+Q; the exit code."""
        self.process.send("\x11")
        end = time.monotonic() + 20
        while self.process.isalive():
            assert time.monotonic() < end, f"it does not end:\n{self.text}"
            self.read()
        self.process.close()
        return int(self.process.exitstatus or 0)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.close(force=True)
