"""What there is to learn from: review, mend, delete, find doubles, export, train."""

from __future__ import annotations

import time
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widgets import Input, Static

from localllm.errors import LocalLLMError
from localllm.tui import learning
from localllm.tui.screens.view import View
from localllm.tui.store import Pair
from localllm.tui.text import plain
from localllm.tui.widgets.confirm import AskText, Confirm
from localllm.tui.widgets.table import Table, cell

_PAGE = 2000  # rows of the table; the export has all


class DatasetScreen(View):
    """Pairs (this answer rather than that) and examples (this answer)."""

    TITLE_TEXT = "Dataset"
    DEFAULT_CSS = """
    DatasetScreen Horizontal.columns { height: 1fr; }
    DatasetScreen Table { width: 3fr; height: 1fr; }
    DatasetScreen #detail { width: 2fr; height: 1fr; padding: 0 1; border-left: vkey $panel; }
    DatasetScreen.-narrow Horizontal.columns { layout: vertical; }
    DatasetScreen.-narrow Table { width: 1fr; }
    DatasetScreen.-narrow #detail { width: 1fr; border-left: none; border-top: hkey $panel; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("d,delete", "delete", "Delete"),
        Binding("u", "dedupe", "Find doubles"),
        Binding("e", "export", "Export"),
        Binding("t", "train", "Fine-tune"),
        Binding("o", "open", "Open chat"),
        Binding("slash", "filter", "Filter"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._pairs: dict[int, Pair] = {}

    def body(self) -> ComposeResult:
        with Horizontal(classes="columns"):
            asked = ("asked", self._asked())
            yield Table(("kind", 8), ("from", 8), asked, ("answer to learn", None))
            with VerticalScroll(id="detail"):
                yield Static("", id="text", markup=False)
        yield Input(placeholder="show only what holds these words", id="filter", classes="line")

    def _asked(self) -> int:
        """Cells of the question, which leave as many to the answer."""
        width = self.app.size.width
        return max(10, min(26, ((3 * width // 5 if width >= 90 else width) - 24) // 2))

    def on_mount(self) -> None:
        self.query_one(Table).focus()
        self._read()

    def _read(self) -> None:
        words = self.query_one("#filter", Input).value.lower().split()
        pairs = self.store.pairs()
        examples = sum(1 for pair in pairs if pair.rejected is None)
        self._pairs = {
            pair.id: pair
            for pair in pairs
            if all(word in _all_text(pair).lower() for word in words)
        }
        newest = list(self._pairs.values())[-_PAGE:]
        self.query_one(Table).fill(
            [
                (
                    str(pair.id),
                    (
                        cell("example" if pair.rejected is None else "pair"),
                        cell(pair.origin),
                        cell(_last(pair)),
                        cell(pair.chosen),
                    ),
                )
                for pair in newest
            ]
        )
        shown = f", {len(newest)} shown" if len(newest) < len(pairs) else ""
        self.title_is(f"Dataset — {len(pairs) - examples} pairs, {examples} examples{shown}")
        if not pairs:
            self.query_one("#text", Static).update(
                "Nothing yet. Rate answers, compare several, or write a better one: each becomes "
                "something to learn from."
            )
        else:
            self._show()

    def _current(self) -> Pair | None:
        key = self.query_one(Table).current
        return None if key is None else self._pairs.get(int(key))

    def on_data_table_row_highlighted(self) -> None:
        self._show()

    def _show(self) -> None:
        pair = self._current()
        if pair is None:
            return
        parts = []
        for message in pair.prompt:
            parts.append(Content.styled(str(message.get("role", "?")), "bold dim"))
            parts.append(Content(plain(str(message.get("content", "")))))
        parts.append(Content.styled("the answer to learn", "bold $text-success"))
        parts.append(Content(plain(pair.chosen)))
        if pair.rejected is not None:
            parts.append(Content.styled("rather than", "bold $text-error"))
            parts.append(Content(plain(pair.rejected)))
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(pair.created))
        parts.append(Content.styled(f"from {pair.origin}, {when}", "dim"))
        self.query_one("#text", Static).update(Content("\n").join(parts))

    def on_input_changed(self) -> None:
        self._read()

    def on_input_submitted(self) -> None:
        self.query_one(Table).focus()

    def action_filter(self) -> None:
        self.query_one("#filter").focus()

    @work(exclusive=True)
    async def action_delete(self) -> None:
        pair = self._current()
        if pair is None:
            return
        if await self.app.push_screen_wait(
            Confirm(f"Delete this {'example' if pair.rejected is None else 'pair'}?", yes="Delete")
        ):
            self.store.delete_pair(pair.id)
            self._read()

    @work(exclusive=True)
    async def action_dedupe(self) -> None:
        """The same but for spaces, and pairs that say the opposite of each other."""
        doubles = learning.doubles(self.store.pairs())
        if not doubles:
            self.notify("No doubles")
            return
        if await self.app.push_screen_wait(
            Confirm(f"Delete {len(doubles)} that say again what another one says?", yes="Delete")
        ):
            for pair in doubles:
                self.store.delete_pair(pair)
            self._read()

    @work(exclusive=True)
    async def action_export(self) -> None:
        path = await self.app.push_screen_wait(
            AskText(
                "Folder to write examples.jsonl and pairs.jsonl into",
                str(Path.home() / "localllm-dataset"),
            )
        )
        if path is None:
            return
        try:
            written = learning.export(self.store.pairs(), Path(path).expanduser())
        except LocalLLMError as error:
            self.tell(error)
            return
        names = ", ".join(f"{count} in {file}" for file, count in written.items())
        self.notify(plain(f"Written: {names}" if written else "Nothing to write"), markup=False)

    async def action_open(self) -> None:
        pair = self._current()
        if pair is None or pair.chat is None:
            self.tell("its chat is gone")
            return
        await self.host.open_chat(pair.chat)
        self.dismiss(None)

    def action_train(self) -> None:
        from localllm.tui.screens.finetune import FinetuneScreen

        self.app.push_screen(FinetuneScreen())


def _last(pair: Pair) -> str:
    return str(pair.prompt[-1].get("content", "")) if pair.prompt else ""


def _all_text(pair: Pair) -> str:
    prompt = " ".join(str(message.get("content", "")) for message in pair.prompt)
    return f"{prompt} {pair.chosen} {pair.rejected or ''} {pair.origin}"
