"""Textual's themes, and one that uses the terminal's own 16 colours."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textual.app import App

ANSI = "ansi"


def theme_for(app: App[Any], name: str) -> tuple[str, str | None]:
    """The theme to use, and what is wrong with the one that was asked for.

    "ansi" is Textual's theme of the terminal's colours, dark or light as the terminal seems to be.
    """
    if name == ANSI:
        return ("ansi-light" if _light_terminal() else "ansi-dark"), None
    if name in app.available_themes:
        return name, None
    return "textual-dark", f"there is no theme {name!r}; /theme lists them"


def _light_terminal() -> bool:
    """COLORFGBG, which some terminals set, ends with the background's colour."""
    background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return background in ("7", "15")
