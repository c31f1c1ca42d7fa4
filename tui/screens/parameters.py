"""How answers are sampled: every parameter, checked as it is typed, and presets of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from textual import events, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from localllm.errors import InvalidRequest
from localllm.tui.answers import NEW_CHATS
from localllm.tui.sampling_fields import (
    SamplingField,
    parse,
    sampling_fields,
    sampling_params,
    shown,
    to_keep,
)
from localllm.tui.screens.view import View
from localllm.tui.store import Preset
from localllm.tui.text import plain
from localllm.tui.widgets.confirm import AskText, Confirm
from localllm.tui.widgets.fields import Field

_AT_ONCE = 24  # lines; more are below the screen, and follow once it is there


class ParametersScreen(View):
    """Sound values are the chat's at once; unsound ones are marked and change nothing."""

    TITLE_TEXT = "Parameters"
    DEFAULT_CSS = """
    ParametersScreen Horizontal.columns { height: 1fr; }
    ParametersScreen #presets { width: 26; height: 1fr; border-right: vkey $panel; }
    ParametersScreen #fields { width: 1fr; height: 1fr; padding: 0 1; }
    ParametersScreen #help { height: 3; padding: 0 1; color: $text-muted; background: $panel; }
    ParametersScreen.-narrow Horizontal.columns { layout: vertical; }
    ParametersScreen.-narrow #presets {
        width: 1fr; height: 6; border-right: none; border-bottom: hkey $panel;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save_preset", "Save as preset", priority=True),
        Binding("ctrl+r", "reset", "Defaults", priority=True),
        Binding("delete", "delete_preset", "Delete preset"),
        Binding("ctrl+d", "for_new_chats", "For new chats", priority=True),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._presets: list[Preset] = []
        self._fields: dict[str, Field] = {}
        self._below: list[Widget] = []  # what is not on the screen at first
        self._filling = False

    def body(self) -> ComposeResult:
        values = self._kept()
        with Horizontal(classes="columns"):
            with Vertical(id="presets"):
                yield Static("Presets", classes="section", markup=False)
                yield OptionList(markup=False)
            with VerticalScroll(id="fields", can_focus=False):
                lines = list(self._lines(values))
                yield from lines[:_AT_ONCE]
                self._below = lines[_AT_ONCE:]
        yield Static("", id="help", markup=False)

    def _lines(self, values: Mapping[str, Any]) -> Iterator[Widget]:
        group = ""
        for field in sampling_fields():
            if field.group != group:
                group = field.group
                yield Static(group, classes="section", markup=False)
            yield self._field(field, values)

    def _field(self, field: SamplingField, values: Mapping[str, Any]) -> Field:
        widget = Field(
            field.name,
            self._typed(field, values),
            label=field.name.replace("_", " "),
            help=field.help,
            placeholder="off" if field.default is None else shown(field, field.default),
            options=field.options,
            flag=field.kind == "flag",
            id=f"param-{field.name}",
        )
        widget.set_class(field.name in values, "-changed")
        self._fields[field.name] = widget
        return widget

    def _typed(self, field: SamplingField, values: Mapping[str, Any]) -> str:
        return shown(field, {**self.host.answers.usual(), **values}.get(field.name, field.default))

    def on_mount(self) -> None:
        self._show_presets()
        self._fields["temperature"].focus_input()
        self._check()
        self.call_after_refresh(self._mount_rest)

    async def _mount_rest(self) -> None:
        await self.query_one("#fields").mount_all(self._below)

    def _kept(self) -> dict[str, Any]:
        chat = self.chat
        return dict(self.store.setting(NEW_CHATS, {}) if chat is None else chat.params)

    def _keep(self, values: Mapping[str, Any]) -> None:
        chat = self.chat
        if chat is None:
            self.store.set_setting(NEW_CHATS, dict(values))
        else:
            self.store.edit_chat(chat.id, params=dict(values))

    # ---- fields

    def on_field_changed(self, event: Field.Changed) -> None:
        if not self._filling:
            self._check()

    def _check(self) -> None:
        """Keeps what was typed if all of it is sound, else says at which field it is not."""
        values: dict[str, Any] = {}
        wrong: dict[str, str] = {}
        usual = self.host.answers.usual()
        for field in sampling_fields():
            typed = self._fields[field.name].value
            try:
                values[field.name] = parse(field, typed)
                if not typed.strip() and values[field.name] is not None:
                    values[field.name] = usual.get(field.name, field.default)
            except InvalidRequest as error:
                wrong[field.name] = str(error)
        kept: dict[str, Any] = {}
        if not wrong:
            try:
                kept = to_keep(values, usual)
            except InvalidRequest as error:
                text = str(error) + (f"; {error.hint}" if error.hint else "")
                wrong[self._blamed(str(error), values)] = text
        for field in sampling_fields():
            widget = self._fields[field.name]
            widget.say(wrong.get(field.name))
            if not wrong:
                widget.set_class(field.name in kept, "-changed")
        if wrong:
            self.title_is("Parameters — not saved: one of them is not sound")
            return
        self._keep(kept)
        whose = "of chats to come" if self.chat is None else "of this chat"
        changed = f"{len(kept)} changed" if kept else "all at their defaults"
        self.title_is(f"Parameters {whose} — {changed}, saved")

    def _blamed(self, message: str, values: Mapping[str, Any]) -> str:
        """The field that an error names, one that was changed if it names several."""
        named = [field for field in sampling_fields() if field.name in message.split(" and ")[0]]
        named = named or [field for field in sampling_fields() if field.name in message]
        changed = [field for field in named if values[field.name] != field.default]
        longest = sorted(changed or named, key=lambda field: -len(field.name))
        return longest[0].name if longest else "temperature"

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        for widget in event.widget.ancestors_with_self:
            if isinstance(widget, Field):
                self.query_one("#help", Static).update(
                    Content.assemble((widget.field_name, "bold"), f": {plain(widget.help_text)}")
                )

    def _fill(self, values: Mapping[str, Any]) -> None:
        self._filling = True
        try:
            for field in sampling_fields():
                self._fields[field.name].value = self._typed(field, values)
        finally:
            self._filling = False
        # The inputs tell of their change later; one check is enough.
        self.call_after_refresh(self._check)

    def action_reset(self) -> None:
        self._fill({})

    def action_for_new_chats(self) -> None:
        chat = self.chat
        if chat is not None:
            self.store.set_setting(NEW_CHATS, dict(chat.params))
            self.notify("New chats begin with these parameters")

    # ---- presets

    def _show_presets(self) -> None:
        self._presets = self.store.presets()
        options = self.query_one(OptionList)
        options.clear_options()
        for preset in self._presets:
            options.add_option(Option(plain(preset.name)))
        if not self._presets:
            options.add_option(Option("none yet: Ctrl+S saves one", disabled=True))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        preset = self._presets[event.option_index]
        try:
            sampling_params(preset.params)
        except InvalidRequest as error:
            self.tell(error)
            return
        self._fill(preset.params)
        self.notify(f"Preset {plain(preset.name)}", markup=False)

    @work(exclusive=True)
    async def action_save_preset(self) -> None:
        if self.query(".-wrong"):
            self.tell("mend the marked parameter first")
            return
        name = await self.app.push_screen_wait(AskText("Name of the preset"))
        if name is None:
            return
        if any(preset.name == name for preset in self._presets) and not (
            await self.app.push_screen_wait(
                Confirm(f"There is a preset {name}. Replace it?", yes="Replace", no="Keep")
            )
        ):
            return
        self.store.save_preset(Preset(name, self._kept()))
        self._show_presets()

    @work(exclusive=True)
    async def action_delete_preset(self) -> None:
        options = self.query_one(OptionList)
        place = options.highlighted
        if isinstance(self.focused, Input) or place is None or place >= len(self._presets):
            return
        name = self._presets[place].name
        if await self.app.push_screen_wait(
            Confirm(f"Delete the preset {name}?", yes="Delete", no="Keep")
        ):
            self.store.delete_preset(name)
            self._show_presets()
