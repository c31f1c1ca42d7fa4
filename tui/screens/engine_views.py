"""The engine at work: speed and context, KV blocks, guesses, the scheduler's lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Static, TabbedContent, TabPane

from localllm.errors import LocalLLMError
from localllm.tui.conversation import asked, last_answer
from localllm.tui.screens.view import View
from localllm.tui.store import Message
from localllm.tui.text import plain
from localllm.tui.tokens import TokenView, kept_tokens, token_views
from localllm.tui.trace import EngineTrace, trace_of, why_no_guesses
from localllm.tui.widgets.context_bar import ContextBar, ContextUse, cache_story
from localllm.tui.widgets.kv_map import FREE, IDLE, SHARED, Block, KvMap
from localllm.tui.widgets.lanes import Lanes
from localllm.tui.widgets.speculation import Mark, acceptance_line, legend, shaded
from localllm.tui.widgets.speed import Speed, receipt_rows

if TYPE_CHECKING:
    from localllm.tui.engine.client import Count
    from localllm.tui.engine.client import KvMap as Snapshot

_MARKS = 4000  # tokens of an answer that are shaded, the last ones
_EVERY = 0.25  # seconds between two looks at what is live
TABS = ("speed", "blocks", "guesses", "lanes")


class EngineScreen(View):
    """Everything here follows the engine while it works; nothing of it slows it down."""

    TITLE_TEXT = "Engine"
    DEFAULT_CSS = """
    EngineScreen TabbedContent { height: 1fr; }
    EngineScreen TabPane { padding: 0; height: 1fr; }
    EngineScreen ContentSwitcher { height: 1fr; }
    EngineScreen .pad { padding: 1 1 0 1; height: auto; }
    EngineScreen Horizontal.columns { height: 1fr; }
    EngineScreen #map { width: 2fr; height: 1fr; padding: 0 1; }
    EngineScreen #block { width: 1fr; height: 1fr; padding: 0 1; border-left: vkey $panel; }
    EngineScreen.-narrow Horizontal.columns { layout: vertical; }
    EngineScreen.-narrow #map { width: 1fr; }
    EngineScreen.-narrow #block { width: 1fr; border-left: none; border-top: hkey $panel; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(number), f"tab('{tab}')", tab.capitalize(), show=False)
            for number, tab in enumerate(TABS, 1)
        ),
        Binding("space", "pause", "Hold still"),
    ]

    def __init__(self, tab: str = "speed") -> None:
        super().__init__()
        self._first = tab
        self._paused = False
        self._trace = EngineTrace()
        self._block_shown: tuple[int, str] | None = None

    def body(self) -> ComposeResult:
        with TabbedContent(initial=self._first):
            with TabPane("1 Speed and context", id="speed"), VerticalScroll(classes="pad"):
                yield Speed()
                yield Static("Context", classes="section", markup=False)
                yield ContextBar()
                yield Static("", id="cache", classes="note", markup=False)
                yield Static("The last answer", classes="section", markup=False)
                yield Static("", id="receipt", classes="note", markup=False)
            with TabPane("2 KV blocks", id="blocks"), Horizontal(classes="columns"):
                with Vertical(id="map"):
                    yield Static("", id="kv-head", classes="note", markup=False)
                    yield KvMap()
                with VerticalScroll(id="block"):
                    yield Static("", id="block-text", markup=False)
            with TabPane("3 Guesses", id="guesses"), VerticalScroll(classes="pad"):
                yield Static("", id="why", markup=False)
                yield Static("", id="acceptance", markup=False)
                yield Static("Guesses in the last answer", classes="section", markup=False)
                yield Static("", id="legend", markup=False)
                yield Static("", id="shaded", markup=False)
            with TabPane("4 Lanes", id="lanes"), VerticalScroll(classes="pad"):
                yield Lanes()

    def on_mount(self) -> None:
        self._trace = trace_of(self.engine)
        self.set_interval(_EVERY, self._look)
        self._look()

    def action_tab(self, name: str) -> None:
        self.query_one(TabbedContent).active = name
        if name == "blocks":
            self.query_one(KvMap).focus()

    @on(TabbedContent.TabActivated)
    def look_at_once(self) -> None:
        self._look()

    def action_pause(self) -> None:
        self._paused = not self._paused
        self.title_is("Engine — held still, space goes on" if self._paused else "Engine")

    def _look(self) -> None:
        if self._paused or not self.is_current:
            return
        tab = self.query_one(TabbedContent).active
        if tab == "speed":
            self._show_speed()
            self._count()
        elif tab == "blocks":
            self._read_blocks()
        elif tab == "guesses":
            self._show_guesses()
        elif tab == "lanes":
            self.query_one(Lanes).show(self._trace)

    # ---- speed and context

    def _answer(self) -> Message | None:
        chat = self.chat
        return None if chat is None else last_answer(self.store, chat)

    def _show_speed(self) -> None:
        answer = self._answer()
        receipt = dict(answer.receipt) if answer else {}
        last = self._trace.last
        busy = last is not None and last.running > 0
        self.query_one(Speed).show(
            self._trace.speed() if busy else None, self._trace.speeds(), receipt
        )
        self.query_one("#cache", Static).update(plain(cache_story(receipt)))
        lines = [
            Content.assemble((f"{name:<13}", "dim"), plain(value))
            for name, value in (receipt_rows(receipt) if receipt else ())
        ]
        self.query_one("#receipt", Static).update(
            Content("\n").join(lines) if lines else "No answer in this chat yet."
        )

    @work(exclusive=True, group="count", exit_on_error=False)
    async def _count(self) -> None:
        chat = self.chat
        if chat is None or self.engine.state.phase != "ready":
            return
        messages = asked(chat, self.store.branch(chat.head))
        if not messages:
            info = self.engine.state.model
            self.query_one(ContextBar).show(ContextUse(0, info.context) if info else None)
            return
        try:
            count = await self.engine.count(messages, self.host.answers.offered())
        except LocalLLMError as error:
            self.query_one("#cache", Static).update(plain(str(error)))
            return
        self.query_one(ContextBar).show(
            context_use(count, self.host.answers.params(chat).get("max_tokens", 256))
        )

    # ---- KV blocks

    @work(exclusive=True, group="blocks", exit_on_error=False)
    async def _read_blocks(self) -> None:
        if self.engine.state.phase != "ready":
            self.query_one("#kv-head", Static).update("The engine has no model loaded.")
            return
        try:
            found = await self.engine.kv_map()
        except LocalLLMError as error:
            self.query_one("#kv-head", Static).update(plain(str(error)))
            return
        self._show_blocks(kv_blocks(found))

    def _show_blocks(self, blocks: Sequence[Block]) -> None:
        view = self.query_one(KvMap)
        view.show(blocks)
        used = [block for block in blocks if block.refcount]
        shared = sum(1 for block in used if block.refcount > 1)
        idle = sum(1 for block in blocks if not block.refcount and block.name)
        head: list[Content | tuple[str, str]] = [
            (f"{len(blocks)} blocks: {len(used)} in use", ""),
            (f", {shared} shared {SHARED}", ""),
            (f", {idle} kept for reuse {IDLE}", ""),
            (f", {len(blocks) - len(used) - idle} free {FREE}", ""),
        ]
        for owner in view.owners():
            head.append((f"  {view.letter(owner)} request {owner}", f"${view.colour(owner)}"))
        self.query_one("#kv-head", Static).update(Content.assemble(*head))
        chosen = view.chosen
        if chosen is not None and self._block_shown != (chosen.number, chosen.name):
            self._show_block(chosen)

    def on_kv_map_chosen(self, event: KvMap.Chosen) -> None:
        self._show_block(event.block)

    @work(exclusive=True, group="block", exit_on_error=False)
    async def _show_block(self, block: Block) -> None:
        self._block_shown = (block.number, block.name)
        owners = ", ".join(f"request {owner}" for owner in block.owners) or "nobody"
        rows = [
            ("block", str(block.number)),
            ("state", block.state),
            ("held by", owners),
            ("references", str(block.refcount)),
            ("hash", block.name or "none: not full yet, or free"),
        ]
        if block.group:
            rows.append(("KV group", str(block.group)))
        text = ""
        if block.refcount or block.name:
            try:
                text = await self.engine.block_text(block.number)
            except LocalLLMError as error:
                text = str(error)
        lines = [Content.assemble((f"{n:<11}", "dim"), plain(v)) for n, v in rows]
        self.query_one("#block-text", Static).update(
            Content("\n").join([*lines, Content(""), Content(plain(text))])
        )

    # ---- guesses

    def _live_tokens(self) -> list[TokenView] | None:
        """Of the answer under way, None without one."""
        number = self.host.chat_id
        live = None if number is None else self.host.answers.live.get(number)
        return None if live is None else token_views(live.seen)

    def _show_guesses(self) -> None:
        answer, chat = self._answer(), self.chat
        wish = str(chat.params.get("speculation", "auto")) if chat else "auto"
        receipt = answer.receipt if answer else None
        why = why_no_guesses(self._trace, receipt, wish)
        self.query_one("#why", Static).update(plain(why))
        self.query_one("#acceptance", Static).update(
            acceptance_line(self._trace.acceptance(), self.size.width - 4)
        )
        tokens = self._live_tokens()
        if tokens is None and answer:
            tokens = kept_tokens(self.app, answer)
        marks = [Mark(token.text, token.fate) for token in (tokens or ())[-_MARKS:]]
        self.query_one("#legend", Static).update(legend(marks) if marks else "")
        self.query_one("#shaded", Static).update(shaded(marks))


def kv_blocks(found: Snapshot) -> list[Block]:
    """The engine's snapshot as the map draws it."""
    return [
        Block(block.number, tuple(block.owners), block.refcount, block.name, block.group)
        for block in found.blocks
    ]


def context_use(count: Count, reserve: int | None) -> ContextUse:
    """reserve: max_tokens; None: as much as there is room for."""
    free = max(0, count.context - count.total)
    return ContextUse(
        count.total, count.context, count.cached, free if reserve is None else reserve
    )
