"""The tokens of an answer: how likely each was, what else there was, and another way from there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import events, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Static

from localllm.errors import LocalLLMError
from localllm.tui.answers import of_one
from localllm.tui.conversation import asked as messages_of
from localllm.tui.screens.view import View
from localllm.tui.store import Message
from localllm.tui.text import plain
from localllm.tui.tokens import TokenView, keep_tokens, kept_tokens, token_views
from localllm.tui.widgets.table import Table, cell

TOP = 10  # alternatives asked for
# From likely to unlikely: the background of a token.
_HEAT = (
    (0.9, ""),
    (0.6, "on $success-muted"),
    (0.3, "on $warning-muted"),
    (0.0, "on $error-muted"),
)


@dataclass(frozen=True)
class _Place:
    """Where a token is drawn: line and cells."""

    line: int
    start: int
    end: int


class TokenText(VerticalScroll, can_focus=True):
    """The answer, a token a piece, shaded by its probability; arrow keys or the mouse choose."""

    DEFAULT_CSS = """
    TokenText { height: 1fr; padding: 0 1; background: $surface; }
    TokenText Static { width: 1fr; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(-1)", "Token before", show=False),
        Binding("right,l", "move(1)", "Next token", show=False),
        Binding("up,k", "line(-1)", "Up", show=False),
        Binding("down,j", "line(1)", "Down", show=False),
        Binding("n", "unlikely(1)", "Next surprise"),
        Binding("N", "unlikely(-1)", "Surprise before", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._tokens: Sequence[TokenView] = ()
        self._places: list[_Place] = []
        self.cursor = 0

    def compose(self) -> ComposeResult:
        yield Static("", markup=False)

    def show(self, tokens: Sequence[TokenView], cursor: int = 0) -> None:
        self._tokens = tokens
        self.cursor = min(cursor, max(0, len(tokens) - 1))
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        """Lines are broken here, not by the widget, so that a click finds its token."""
        width = max(10, self.scrollable_content_region.width)
        self._places, lines, line, used = [], [], Content(""), 0
        for number, token in enumerate(self._tokens):
            text, breaks = _drawn(token.text)
            piece = Content(text)
            if used + piece.cell_length > width and used:
                lines.append(line)
                line, used = Content(""), 0
            style = "reverse" if number == self.cursor else _heat(token)
            line += Content.styled(text, style)
            self._places.append(_Place(len(lines), used, used + piece.cell_length))
            used += piece.cell_length
            for _ in range(breaks):
                lines.append(line)
                line, used = Content(""), 0
        lines.append(line)
        self.query_one(Static).update(Content("\n").join(lines))
        if self._places:
            place = self._places[self.cursor]
            if not self.scroll_offset.y <= place.line < self.scroll_offset.y + self.size.height:
                self.scroll_to(y=max(0, place.line - self.size.height // 2), animate=False)

    def action_move(self, by: int) -> None:
        self._go(self.cursor + by)

    def action_line(self, by: int) -> None:
        if not self._places:
            return
        here = self._places[self.cursor]
        wanted = here.line + by
        near = [
            (abs(place.start - here.start), number)
            for number, place in enumerate(self._places)
            if place.line == wanted
        ]
        if near:
            self._go(min(near)[1])

    def action_unlikely(self, by: int) -> None:
        """To the next token that was not the likeliest."""
        place = self.cursor + by
        while 0 <= place < len(self._tokens):
            if self._tokens[place].rank != 1:
                self._go(place)
                return
            place += by

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset(self)
        if offset is None:
            return
        line = offset.y + self.scroll_offset.y
        for number, place in enumerate(self._places):
            if place.line == line and place.start <= offset.x < max(place.end, place.start + 1):
                self._go(number)
                return

    def _go(self, number: int) -> None:
        if 0 <= number < len(self._tokens):
            self.cursor = number
            self._draw()
            self.screen.show_token(number)  # type: ignore[attr-defined]


class InspectorScreen(View):
    """Enter on an alternative begins a new branch that goes on from there."""

    TITLE_TEXT = "Tokens"
    DEFAULT_CSS = """
    InspectorScreen Horizontal.columns { height: 1fr; }
    InspectorScreen #side { width: 46; height: 1fr; border-left: vkey $panel; }
    InspectorScreen Table { height: 1fr; }
    InspectorScreen.-narrow Horizontal.columns { layout: vertical; }
    InspectorScreen.-narrow #side {
        width: 1fr; height: 14; border-left: none; border-top: hkey $panel;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "alternatives", "Other tokens"),
    ]

    def __init__(self, message: int) -> None:
        super().__init__()
        self._message_id = message
        self._message: Message | None = None
        self._tokens: Sequence[TokenView] = ()

    def body(self) -> ComposeResult:
        with Horizontal(classes="columns"):
            yield TokenText()
            with Vertical(id="side"):
                yield Static("", id="about", classes="note", markup=False)
                yield Table(
                    ("", 3), ("token", 18), ("chance", 7), ("", 10), enter="Go on from this one"
                )
        yield Static("", id="said", classes="note", markup=False)

    def on_mount(self) -> None:
        self.query_one(TokenText).focus()
        self._load()

    @work(exclusive=True)
    async def _load(self) -> None:
        """The tokens as they were drawn; where these are not kept, the answer is drawn again."""
        try:
            message = self._message = self.store.message(self._message_id)
        except KeyError:
            self.tell("this message is gone")
            return
        found = kept_tokens(self.app, message)
        if found is not None and any(token.alternatives for token in found):
            self._show(found)
            return
        said = self.query_one("#said", Static)
        said.update("Drawing the answer again with its seed, to see what else there was …")
        try:
            tokens = await self._again(message)
        except LocalLLMError as error:
            self.tell(error)
            said.update(plain(str(error)))
            return
        text = "".join(token.text for token in tokens)
        if text.strip() != (message.reasoning + message.content).strip() and (
            message.content.strip() not in text
        ):
            said.update(
                "These are the tokens of the answer as drawn now. It differs from the one that is "
                "kept: that was edited, or made by another model or adapter."
            )
        else:
            said.update("")
            keep_tokens(self.app, message.id, tokens)
        self._show(tokens)

    async def _again(self, message: Message) -> list[TokenView]:
        chat = self.store.chat(message.chat)
        branch = self.store.branch(message.parent)
        params = of_one(message.params)
        seed = message.receipt.get("seed")
        if seed is not None:
            params["seed"] = seed
        generated = message.receipt.get("generated_tokens")
        if generated:
            params["max_tokens"] = generated
        messages = messages_of(chat, branch)
        # What a fork began with was given, not drawn.
        prefix = str(message.extra.get("prefix", ""))
        if prefix:
            messages.append({"role": "assistant", "content": prefix})
        asked = self.engine.ask(
            messages,
            params,
            adapter=message.adapter,
            adapter_weight=chat.adapter_weight,
            continue_last=bool(prefix),
            logprobs=TOP,
        )
        tokens = [TokenView(-1, prefix)] if prefix else []
        sample = int(message.extra.get("sample", 0))  # of a beam search every beam is made again
        async for piece in asked:
            if piece.index == sample:
                tokens += token_views(piece.tokens)
        return tokens

    def _show(self, tokens: Sequence[TokenView]) -> None:
        self._tokens = [token for token in tokens if token.fate != "rejected"]
        self.title_is(f"Tokens — {len(self._tokens)} of the answer")
        self.query_one(TokenText).show(self._tokens)
        self.show_token(0)

    def show_token(self, number: int) -> None:
        table = self.query_one(Table)
        table.clear()
        if not self._tokens:
            return
        token = self._tokens[number]
        chance = "not told" if token.logprob is None else f"{math.exp(token.logprob):.1%}"
        rank = "" if token.rank is None else f", choice {token.rank}"
        fate = {"accepted": ", guessed", "own": ""}.get(token.fate, "")
        self.query_one("#about", Static).update(
            f"token {number + 1} of {len(self._tokens)}, id {token.id}: {chance}{rank}{fate}"
        )
        for place, other in enumerate(token.alternatives):
            share = math.exp(other.logprob)
            table.add_row(
                cell("➤" if other.id == token.id else place + 1),
                cell(repr(other.text)),
                cell(f"{share:.1%}"),
                cell("█" * max(0, round(share * 10)), "green" if other.id == token.id else ""),
                key=str(place),
            )

    def on_data_table_row_selected(self) -> None:
        self._fork()

    def action_alternatives(self) -> None:
        self.query_one(Table).focus()

    @work(exclusive=True, group="fork")
    async def _fork(self) -> None:
        """A sibling that begins with the tokens before this one and the chosen alternative."""
        message, number = self._message, self.query_one(TokenText).cursor
        if message is None or not self._tokens:
            return
        token = self._tokens[number]
        row = self.query_one(Table).cursor_row
        if row >= len(token.alternatives):
            return
        other = token.alternatives[row]
        if other.id == token.id:
            self.notify("This is the token that was drawn; choose another one")
            return
        if "\ufffd" in other.text:
            self.tell("this token is a part of a character; choose another one")
            return
        whole = "".join(item.text for item in self._tokens[:number]) + other.text
        prefix = whole if not message.reasoning else _after_thinking(whole, message.reasoning)
        if prefix is None:
            self.tell("this token belongs to the thinking; a branch can begin in the answer only")
            return
        sibling = self.store.add_message(
            message.chat,
            message.parent,
            "assistant",
            prefix,
            reasoning=message.reasoning,
            status="stopped",
            model=message.model,
            adapter=message.adapter,
            params=message.params,
            extra={"forked_from": message.id, "prefix": prefix},
        )
        try:
            self.host.answers.go_on(sibling)
        except LocalLLMError as error:
            self.tell(error)
        await self.host.open_chat(message.chat, sibling.id)
        self.dismiss(None)


def _after_thinking(text: str, reasoning: str) -> str | None:
    place = text.find(reasoning.strip()) if reasoning.strip() else 0
    if place < 0:
        return None
    rest = text[place + len(reasoning.strip()) :].lstrip()
    if rest.startswith("</"):
        rest = rest.partition(">")[2].lstrip()
    return rest or None


def _drawn(text: str) -> tuple[str, int]:
    """A token as it is shown, and how many lines it ends."""
    breaks = text.count("\n")
    shown = plain(text.replace("\n", "⏎").replace("\t", "→").replace("\r", "␍"))
    return shown or "∅", breaks


def _heat(token: TokenView) -> str:
    if token.logprob is None:
        return ""
    chance = math.exp(token.logprob)
    return next(style for least, style in _HEAT if chance >= least)
