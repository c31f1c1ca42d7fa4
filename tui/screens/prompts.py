"""The chat's system prompt, and the library of prompts with {{variables}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalGroup, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, OptionList, Static, TextArea
from textual.widgets.option_list import Option

from localllm.errors import LocalLLMError
from localllm.tui.screens.view import View
from localllm.tui.store import Prompt
from localllm.tui.templates import fill, to_ask
from localllm.tui.text import plain
from localllm.tui.widgets.confirm import AskText, Confirm
from localllm.tui.widgets.fields import Field

_KINDS = {"system": "system prompt", "user": "message"}


class PromptsScreen(View):
    """Left the library, right the text: of the chat's system prompt, or of a prompt."""

    TITLE_TEXT = "Prompts"
    DEFAULT_CSS = """
    PromptsScreen Horizontal.columns { height: 1fr; }
    PromptsScreen #library { width: 34; height: 1fr; border-right: vkey $panel; }
    PromptsScreen TextArea { height: 1fr; }
    PromptsScreen.-narrow Horizontal.columns { layout: vertical; }
    PromptsScreen.-narrow #library {
        width: 1fr; height: 8; border-right: none; border-bottom: hkey $panel;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "Save", priority=True),
        Binding("enter", "use", "Use", show=True),
        Binding("n", "new('user')", "New message"),
        Binding("s", "new('system')", "New system prompt"),
        Binding("delete", "delete", "Delete"),
        Binding("ctrl+l", "keep_system", "Into the library", priority=True),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._prompts: list[Prompt] = []
        self._open: str | None = None  # a prompt's name; None: the chat's system prompt

    def body(self) -> ComposeResult:
        with Horizontal(classes="columns"):
            with Vertical(id="library"):
                yield Static("Library", classes="section", markup=False)
                yield OptionList(markup=False)
            with Vertical():
                yield Static("", id="what", classes="note", markup=False)
                yield TextArea(show_line_numbers=False, tab_behavior="focus")

    def on_mount(self) -> None:
        self._show_library(None)
        self._edit(None)
        self.query_one(OptionList).focus()

    def _show_library(self, current: str | None) -> None:
        self._prompts = self.store.prompts()
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_option(Option("This chat's system prompt"))
        for prompt in self._prompts:
            options.add_option(Option(plain(f"{prompt.name}  ({_KINDS[prompt.kind]})")))
        names = [prompt.name for prompt in self._prompts]
        options.highlighted = names.index(current) + 1 if current in names else 0

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        place = event.option_index
        self._edit(self._prompts[place - 1].name if place else None)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        if event.option_index:
            self.action_use()
        else:
            self.query_one(TextArea).focus()

    def _prompt(self) -> Prompt | None:
        return next((prompt for prompt in self._prompts if prompt.name == self._open), None)

    def _edit(self, name: str | None) -> None:
        self._open = name
        prompt, chat = self._prompt(), self.chat
        if prompt is None:
            self.query_one(TextArea).load_text("" if chat is None else chat.system)
            text = (
                "No chat is open; open one to give it a system prompt."
                if chat is None
                else "The system prompt of this chat. Ctrl+S saves it, Ctrl+L puts it into the "
                "library."
            )
        else:
            self.query_one(TextArea).load_text(prompt.text)
            try:
                names = ", ".join(to_ask(prompt.text))
                asks = f" Asks for {names}." if names else ""
            except LocalLLMError as error:
                asks = f" {error}"
            text = f"{prompt.name}, a {_KINDS[prompt.kind]}. {{{{name}}}} is asked for.{asks}"
        self.query_one("#what", Static).update(plain(text))

    async def action_save(self) -> None:
        text = self.query_one(TextArea).text
        prompt, chat = self._prompt(), self.chat
        if prompt is not None:
            self.store.save_prompt(Prompt(prompt.name, prompt.kind, text))
            self._show_library(prompt.name)
        elif chat is not None:
            self.store.edit_chat(chat.id, system=text)
            await self.host.open_chat(chat.id)
        else:
            self.tell("no chat is open")
            return
        self.notify("Saved")

    @work(exclusive=True)
    async def action_new(self, kind: str) -> None:
        if isinstance(self.focused, TextArea):
            return
        name = await self.app.push_screen_wait(AskText(f"Name of the new {_KINDS[kind]}"))
        if name is None:
            return
        if any(prompt.name == name for prompt in self._prompts):
            self.tell(f"there is a prompt {name} already")
            return
        self.store.save_prompt(Prompt(name, "system" if kind == "system" else "user", ""))
        self._show_library(name)
        self._edit(name)
        self.query_one(TextArea).focus()

    @work(exclusive=True)
    async def action_keep_system(self) -> None:
        name = await self.app.push_screen_wait(AskText("Name of the system prompt"))
        if name is None:
            return
        if any(prompt.name == name for prompt in self._prompts) and not (
            await self.app.push_screen_wait(
                Confirm(f"There is a prompt {name}. Replace it?", yes="Replace", no="Keep")
            )
        ):
            return
        self.store.save_prompt(Prompt(name, "system", self.query_one(TextArea).text))
        self._show_library(name)

    @work(exclusive=True)
    async def action_delete(self) -> None:
        prompt = self._prompt()
        if prompt is None or isinstance(self.focused, TextArea):
            return
        if await self.app.push_screen_wait(
            Confirm(f"Delete the prompt {prompt.name}?", yes="Delete", no="Keep")
        ):
            self.store.delete_prompt(prompt.name)
            self._show_library(None)
            self._edit(None)

    @work(exclusive=True)
    async def action_use(self) -> None:
        """A system prompt becomes the chat's, a message is put before the cursor to be sent."""
        prompt, chat = self._prompt(), self.chat
        if prompt is None:
            return
        if chat is None:
            self.tell("no chat is open")
            return
        values: Mapping[str, str] | None = {}
        try:
            if names := to_ask(prompt.text):
                values = await self.app.push_screen_wait(FillIn(prompt.name, names))
            if values is None:
                return
            text = fill(prompt.text, values)
        except LocalLLMError as error:
            self.tell(error)
            return
        if prompt.kind == "system":
            self.store.edit_chat(chat.id, system=text)
        else:
            self.store.edit_chat(chat.id, draft=text)
        await self.host.open_chat(chat.id)
        self.dismiss(None)


class FillIn(ModalScreen[Mapping[str, str] | None]):
    """The variables of a prompt, one a line."""

    DEFAULT_CSS = """
    FillIn { align: center middle; }
    FillIn > VerticalGroup {
        width: 76; max-width: 94%; max-height: 90%; padding: 1 2;
        background: $surface; border: round $primary;
    }
    FillIn VerticalScroll { height: auto; max-height: 20; margin: 1 0; }
    FillIn Horizontal.buttons { height: auto; align-horizontal: right; }
    FillIn Button { margin-left: 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "Cancel"),
        Binding("ctrl+s", "done", "Use", priority=True),
    ]

    def __init__(self, heading: str, names: Mapping[str, str]) -> None:
        """names: of the variables -> what they begin with."""
        super().__init__()
        self._heading, self._names = heading, names

    def compose(self) -> ComposeResult:
        with VerticalGroup():
            yield Static(plain(self._heading), classes="section", markup=False)
            with VerticalScroll(can_focus=False):
                for name, default in self._names.items():
                    yield Field(name, default)
            with Horizontal(classes="buttons"):
                yield Button("Cancel", id="cancel")
                yield Button("Use", id="use", variant="primary")

    def on_mount(self) -> None:
        self.query(Field).first().focus_input()

    def on_input_submitted(self) -> None:
        """Enter goes to the next line, and from the last one is done."""
        fields = list(self.query(Field))
        place = next((n for n, field in enumerate(fields) if field.has_focus_within), 0)
        if place + 1 < len(fields):
            fields[place + 1].focus_input()
        else:
            self.action_done()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "use":
            self.action_done()
        else:
            self.action_cancel()

    def action_done(self) -> None:
        self.dismiss({field.field_name: field.value for field in self.query(Field)})

    def action_cancel(self) -> None:
        self.dismiss(None)
