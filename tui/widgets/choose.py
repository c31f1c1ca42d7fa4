"""A choice of one among several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalGroup
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from localllm.tui.text import one_line


class Choose(ModalScreen[str | None]):
    """The option that was chosen, None for none. on_highlight: told of each one passed over."""

    DEFAULT_CSS = """
    Choose { align: center middle; }
    Choose > VerticalGroup {
        width: 60; max-width: 92%; max-height: 80%; padding: 1 2;
        background: $surface; border: round $primary;
    }
    Choose OptionList { max-height: 20; border: none; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "Cancel"),
        Binding("j", "move(1)", show=False),
        Binding("k", "move(-1)", show=False),
    ]

    def __init__(
        self,
        question: str,
        options: Sequence[str],
        value: str = "",
        *,
        on_highlight: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self._question, self._options, self._value = question, list(options), value
        self._on_highlight = on_highlight

    def compose(self) -> ComposeResult:
        with VerticalGroup():
            yield Static(one_line(self._question), markup=False)
            yield OptionList(*(Option(one_line(o, 80)) for o in self._options), markup=False)

    def on_mount(self) -> None:
        options = self.query_one(OptionList)
        if self._value in self._options:
            options.highlighted = self._options.index(self._value)
        options.focus()

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()
        if self._on_highlight is not None:
            self._on_highlight(self._options[event.option_index])

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss(self._options[event.option_index])

    def action_move(self, by: int) -> None:
        options = self.query_one(OptionList)
        options.action_cursor_down() if by > 0 else options.action_cursor_up()

    def action_cancel(self) -> None:
        self.dismiss(None)
