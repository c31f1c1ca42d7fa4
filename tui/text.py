"""Text that others wrote, made safe for a terminal."""

from __future__ import annotations

import re

# Whole escape sequences first (CSI, OSC and the other strings, two-byte ones), then what controls
# are left: a lone ESC, C0 but for \n and \t, DEL and C1.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Marks that turn the direction of writing or hide text; they make a text read as what it is not.
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c]")


def plain(text: str) -> str:
    """The text without terminal escapes, control characters and marks that reverse its direction.

    Line feeds and tabs stay; \\r\\n and a lone \\r become \\n.
    """
    if text.isascii() and text.isprintable():
        return text
    text = text.replace("\r\n", "\n")
    text = _ESCAPES.sub("", text).replace("\r", "\n")
    return _BIDI.sub("", _CONTROLS.sub("", text))


def one_line(text: str, width: int = 0) -> str:
    """The text as a single line, white space folded; longer than `width` (0: any) it ends in …"""
    line = " ".join(plain(text).split())
    return line if not width or len(line) <= width else line[: max(0, width - 1)].rstrip() + "…"


def model_name(name: str) -> str:
    """A model's or an adapter's name for the screen; of a path its end."""
    is_path = name.startswith(("/", ".", "~"))
    return one_line(name.rstrip("/").rpartition("/")[2] if is_path else name)
