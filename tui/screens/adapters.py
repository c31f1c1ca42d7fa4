"""Adapters of the open chat: on or off, and how strongly."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Input, Static

from localllm.errors import LocalLLMError
from localllm.tui.finetune_job import Jobs
from localllm.tui.screens.compare import CompareScreen, before_and_after
from localllm.tui.screens.view import View
from localllm.tui.widgets.confirm import AskText
from localllm.tui.widgets.table import Table, cell

KNOWN = "adapters"  # the setting: folders that were used before
_MOST = 64
_WEIGHTS = (-4.0, 4.0)


class AdaptersScreen(View):
    """An adapter is loaded beside the model: turning it on or off needs no reloading."""

    TITLE_TEXT = "Adapters"
    DEFAULT_CSS = """
    AdaptersScreen Table { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("w", "weight", "Weight"),
        Binding("b", "compare", "Before and after"),
        Binding("n", "other", "Other folder"),
        Binding("d,delete", "forget", "Take off the list"),
    ]

    def __init__(self, runs: Jobs | None = None) -> None:
        super().__init__()
        self._runs = runs or Jobs()

    def body(self) -> ComposeResult:
        yield Static(
            "Enter turns an adapter on or off in this chat. Its weight scales what it changes: 1 "
            "as it was trained, 0.5 half of it, 0 nothing.",
            classes="note",
            markup=False,
        )
        yield Table(("", 4), ("weight", 7), ("adapter", 28), ("folder", None), enter="On or off")
        yield Input(placeholder="another one: the folder of a PEFT or MLX adapter", classes="line")

    def on_mount(self) -> None:
        self.query_one(Table).focus()
        self._read()

    def _known(self) -> list[str]:
        """The chat's own, those of finished runs, those used before."""
        chat = self.chat
        found = [chat.adapter] if chat and chat.adapter else []
        found += [str(path) for job in self._runs.all() if (path := job.adapter()) is not None]
        found += self.store.setting(KNOWN, [])
        return list(dict.fromkeys(found))[:_MOST]

    def _read(self) -> None:
        chat, rows = self.chat, []
        for folder in self._known():
            on = chat is not None and chat.adapter == folder
            weight = f"{chat.adapter_weight:g}" if on and chat is not None else ""
            cells = (
                cell("on" if on else "", "green"),
                cell(weight),
                cell(Path(folder).name, "bold" if on else ""),
                cell(folder),
            )
            rows.append((folder, cells))
        self.query_one(Table).fill(rows)
        if chat is None:
            self.title_is("Adapters — no chat is open")

    def _current(self) -> str | None:
        return self.query_one(Table).current

    def on_data_table_row_selected(self) -> None:
        self.action_switch()

    def action_switch(self) -> None:
        folder, chat = self._current(), self.chat
        if folder is None or chat is None:
            return
        self._set(None if chat.adapter == folder else folder, 1.0)

    @work(exclusive=True)
    async def _set(self, folder: str | None, weight: float) -> None:
        """It is loaded first: a chat never names an adapter that does not fit its model."""
        chat = self.chat
        if chat is None:
            return
        if folder is not None:
            try:
                await self.engine.load_adapter(folder)
            except LocalLLMError as error:
                self.tell(error)
                return
            known = [folder, *(one for one in self.store.setting(KNOWN, []) if one != folder)]
            self.store.set_setting(KNOWN, known[:_MOST])
        self.store.edit_chat(chat.id, adapter=folder, adapter_weight=weight)
        await self.host.open_chat(chat.id)
        self._read()

    @work(exclusive=True, group="weight")
    async def action_weight(self) -> None:
        folder, chat = self._current(), self.chat
        if folder is None or chat is None:
            return
        typed = await self.app.push_screen_wait(
            AskText("Weight of the adapter in this chat", f"{chat.adapter_weight:g}")
        )
        if typed is None:
            return
        try:
            weight = float(typed)
        except ValueError:
            weight = float("nan")
        if not _WEIGHTS[0] <= weight <= _WEIGHTS[1]:
            self.tell(f"a weight is a number from {_WEIGHTS[0]:g} to {_WEIGHTS[1]:g}")
            return
        self._set(folder, weight)

    def action_compare(self) -> None:
        folder, chat = self._current(), self.chat
        if folder is not None and chat is not None:
            weight = chat.adapter_weight if chat.adapter == folder else 1.0
            self.app.push_screen(CompareScreen(before_and_after(folder, weight), run=True))

    def action_other(self) -> None:
        self.query_one(Input).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        folder = event.value.strip()
        if not folder:
            return
        if self.chat is None:
            self.tell("no chat is open")
            return
        event.input.clear()
        self.query_one(Table).focus()
        self._set(str(Path(folder).expanduser().absolute()), 1.0)

    def action_forget(self) -> None:
        folder = self._current()
        known = self.store.setting(KNOWN, [])
        if folder in known:
            self.store.set_setting(KNOWN, [one for one in known if one != folder])
            self._read()
        else:
            self.tell("this one is the chat's own, or a run's: it stays on the list")
