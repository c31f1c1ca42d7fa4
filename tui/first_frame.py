"""Something to type into while Textual is still loading.

The terminal itself echoes what is typed, into a box where the app will have its own. Nobody reads
it meanwhile, so that all of it is there for the app.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from localllm.tui.settings import Settings

_WIDE, _SIDEBAR = 90, 30  # columns: of a screen that has room for the list of chats; of the list
_LEAVE = "\x1b[?1049l"  # the alternate screen
_ENTER = "\x1b[?1049h\x1b[2J"


@contextmanager
def first_frame(settings: Settings) -> Iterator[None]:
    """Shown until the block ends, and then left for the app to draw over; an error removes it.

    Nothing is shown without a terminal, and to screen readers.
    """
    try:
        import termios
    except ImportError:
        yield
        return
    if settings.plain or not sys.stdin.isatty() or not sys.stderr.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    # Every key goes into the queue as it is, and Enter as the app knows it.
    echoing = termios.tcgetattr(terminal)
    echoing[0] &= ~termios.ICRNL
    echoing[3] &= ~(termios.ICANON | termios.IEXTEN | termios.ECHOCTL)
    try:
        termios.tcsetattr(terminal, termios.TCSANOW, echoing)
        _write(_ENTER + box(*shutil.get_terminal_size(), sidebar=settings.sidebar))
        yield
    except BaseException:
        _write(_LEAVE)
        raise
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def box(columns: int, lines: int, *, sidebar: bool) -> str:
    """Codes that draw it in the terminal's own colours, and leave the cursor in it."""
    left = _SIDEBAR if sidebar and columns >= _WIDE else 0
    inner = max(0, columns - left - 2)
    title = "─ Say something "[:inner]
    rows = (f"╭{title:─<{inner}}╮", f"│{'':{inner}}│", f"╰{'':─<{inner}}╯")
    top = max(1, lines - 4)  # below it are the status and the keys
    drawn = "".join(f"\x1b[{top + n};{left + 1}H{row}" for n, row in enumerate(rows))
    return f"\x1b[2m{drawn}\x1b[m\x1b[{top + 1};{left + 3}H"


def _write(codes: str) -> None:
    sys.stderr.write(codes)
    sys.stderr.flush()
