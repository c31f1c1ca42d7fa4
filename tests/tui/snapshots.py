"""Pictures of screens: two sizes and two themes of each, as `@screens(make_app)` parametrises.

A test takes `look`, and `snap_compare` of pytest-textual-snapshot:

    @screens
    def test_models_screen(look, snap_compare):
        assert look.same(snap_compare, app, before)

The clock stands still, nothing moves or blinks, and the size is fixed, so that a picture changes
with the screen alone. `pytest --snapshot-update` draws them anew; look at them before they are
committed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from textual.app import App
from textual.widgets import Input, TextArea

Before = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True)
class Look:
    """size: columns and lines."""

    size: tuple[int, int]
    theme: str

    def same(self, compare: Any, app: App[Any], before: Before | None = None) -> bool:
        """Whether the app, after `before(pilot)`, looks as in its picture."""

        async def prepare(pilot: Any) -> None:
            app.theme = self.theme
            await pilot.pause()
            if before is not None:
                await before(pilot)
            for widget in app.screen.query("TextArea, Input"):
                assert isinstance(widget, TextArea | Input)
                widget.cursor_blink = False
            await pilot.pause()

        app.animation_level = "none"
        return bool(compare(app, terminal_size=self.size, run_before=prepare))


LOOKS = [
    pytest.param(
        Look(size, theme),
        id=f"{size[0]}-{theme}",
        # The other two of each four are slow tests.
        marks=[pytest.mark.slow] if (size[0] == 60) == (theme == "textual-dark") else [],
    )
    for size in ((60, 24), (120, 36))
    for theme in ("textual-dark", "ansi-light")
]
screens = pytest.mark.parametrize("look", LOOKS)
