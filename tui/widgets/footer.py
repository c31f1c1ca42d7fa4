"""The keys that work where the user is, in one line. A click on one calls its command.

Textual's own footer is a widget a key, made anew whenever the focus moves: with every message that
is chosen that takes longer than all the rest.
"""

from __future__ import annotations

from textual.app import RenderResult
from textual.binding import Binding
from textual.content import Content
from textual.screen import Screen
from textual.style import Style
from textual.widget import Widget

from localllm.tui.commands import COMMANDS
from localllm.tui.text import one_line


class KeyLine(Widget):
    DEFAULT_CSS = """
    KeyLine {
        dock: bottom; height: 1; background: $panel; padding: 0 1;
        link-style: none; link-color: $foreground; link-background: $panel;
    }
    """

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._bindings_shown: list[Binding] = []

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, self._changed)
        self._changed(self.screen)

    def _changed(self, screen: Screen[object]) -> None:
        found: dict[str, Binding] = {}
        for active in screen.active_bindings.values():
            binding = active.binding
            if binding.show and active.enabled:
                found.setdefault(binding.action, binding)
        # Where a field has a key of the screen too, the screen's would come before its others.
        own = {key: number for number, key in enumerate(screen._bindings.key_to_bindings)}
        shown = sorted(found.values(), key=lambda one: (*_place(one), own.get(one.key, -1)))
        if shown != self._bindings_shown:
            self._bindings_shown = shown
            self.refresh()

    def render(self) -> RenderResult:
        """As many as there is room for; the key of the help, which tells all, is always there."""
        parts = {binding.id or binding.key: self._part(binding) for binding in self._bindings_shown}
        last = parts.pop("help", Content(""))
        room = self.size.width - last.cell_length
        shown: list[Content] = []
        for part in parts.values():
            room -= part.cell_length
            if room < 0:
                break
            shown.append(part)
        return Content("").join([*shown, last])

    def _part(self, binding: Binding) -> Content:
        key = self.app.get_key_display(binding)
        meta = Style.from_meta({"@click": f"app.pressed({binding.key!r})"})
        told = Content.assemble((key, "bold $accent"), f" {one_line(binding.description)}")
        return told.stylize(meta) + Content("  ")


def _place(binding: Binding) -> tuple[int, int]:
    """A screen's own keys and a message's come before what can be done anywhere."""
    for number, command in enumerate(COMMANDS):
        if command.name == binding.id:
            return (2 if command.where in ("everywhere", "chat") else 1), number
    return 0, 0
