"""`localllm chat` without options: the app, before anything that parses options is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localllm.tui.opening import Opening

_FLAGS = ("--resume", "--new")


def opening(arguments: Sequence[str]) -> Opening | None:
    """What the app is to begin with; None where the arguments have to be parsed."""
    if arguments[:1] != ["chat"] or not has_screen():
        return None
    flags = [word for word in arguments[1:] if word in _FLAGS]
    names = [word for word in arguments[1:] if word not in _FLAGS]
    if len(flags) > 1 or len(names) > 1 or any(name[:1] in ("-", "") for name in names):
        return None
    from localllm.tui.opening import Opening

    model = names[0] if names else None
    return Opening(model=model, resume="--resume" in flags, new="--new" in flags)


def has_screen() -> bool:
    """A terminal, or the browser that textual-serve stands in for one with."""
    screen = (sys.stdin, sys.stdout, sys.stderr)  # Textual draws on the last
    return all(stream.isatty() for stream in screen) or "TEXTUAL_DRIVER" in os.environ
