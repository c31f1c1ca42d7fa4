"""Lines of a form: a name, where it is typed, what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input, Select, Static, Switch

from localllm.tui.text import one_line, plain

_LABEL = 24  # cells


class Field(Widget):
    """name: how it is told apart; label: what is shown. options: makes it a choice. flag: on or
    off. `Changed` carries the text as typed ("True" and "False" of a flag)."""

    DEFAULT_CSS = """
    Field { height: auto; width: 1fr; }
    Field Input, Field Select, Field Switch { margin: 0 0 0 24; }
    Field Input, Field Input:focus {
        height: 1; border: none; padding: 0 1; background: $boost;
    }
    Field Input:focus { background: $primary-muted; }
    Field.-wrong Input { background: $error-muted; }
    Field Switch, Field Switch:focus { height: 1; border: none; padding: 0; background: $boost; }
    Field Switch:focus { background: $primary-muted; }
    Field .error { color: $text-error; height: auto; }
    """

    class Changed(Message):
        def __init__(self, field: Field) -> None:
            super().__init__()
            self.field = field

        @property
        def control(self) -> Field:
            return self.field

    def __init__(
        self,
        name: str,
        value: str = "",
        *,
        label: str | None = None,
        help: str = "",
        placeholder: str = "",
        options: Sequence[str] = (),
        flag: bool = False,
        id: str | None = None,
    ) -> None:
        super().__init__(id=id, name=name)
        self.field_name = name
        self._label = label or name
        self._wrong: Static | None = None
        self._value = value
        self._placeholder = placeholder
        self._options = tuple(options)
        self._flag = flag
        self.help_text = help
        self.tooltip = plain(help) or None

    def compose(self) -> ComposeResult:
        if self._flag:
            yield Switch(self._value.lower() == "true", animate=False)
        elif self._options:
            yield Select(
                [(option, option) for option in self._options],
                value=self._value if self._value in self._options else self._options[0],
                allow_blank=False,
                compact=True,
            )
        else:
            yield Input(self._value, placeholder=self._placeholder)
        if self._wrong is not None:
            yield self._wrong

    def render(self) -> Content:
        """The label, drawn beneath its input: a widget of its own for each would take a third of
        the time that a long form takes to open."""
        style = "$text-accent bold" if self.has_class("-changed") else "$text"
        return Content.styled(one_line(self._label, _LABEL - 1), style)

    @property
    def label(self) -> str:
        return self._label

    @label.setter
    def label(self, label: str) -> None:
        self._label = label
        self.refresh()

    @property
    def value(self) -> str:
        return self._value

    @value.setter
    def value(self, value: str) -> None:
        self._value = value
        if not self.is_mounted:
            return
        if self._flag:
            self.query_one(Switch).value = value.lower() == "true"
        elif self._options:
            self.query_one(Select).value = value if value in self._options else self._options[0]
        else:
            self.query_one(Input).value = value

    def say(self, error: str | None) -> None:
        """Shows what is wrong, or that nothing is."""
        self.set_class(error is not None, "-wrong")
        if error is None:
            if self._wrong is not None and self.is_mounted:
                self._wrong.remove()
            self._wrong = None
        elif self._wrong is not None:
            self._wrong.update(plain(error))
        else:
            self._wrong = Static(plain(error), classes="error", markup=False)
            if self.is_mounted:
                self.mount(self._wrong)

    def focus_input(self) -> None:
        self.query_one("Input, Switch, Select").focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        self._took(event.value)

    def on_switch_changed(self, event: Switch.Changed) -> None:
        event.stop()
        self._took(str(event.value))

    def on_select_changed(self, event: Select.Changed) -> None:
        event.stop()
        self._took(str(event.value))

    def _took(self, value: str) -> None:
        if value != self._value:
            self._value = value
            self.post_message(self.Changed(self))
