"""Answers as Markdown: links inert, HTML as text, maths as written, code with its language."""

from __future__ import annotations

import re
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from textual.app import ComposeResult
from textual.containers import HorizontalGroup
from textual.content import Content
from textual.css.query import NoMatches
from textual.widgets import Label, Markdown, Static
from textual.widgets._markdown import MarkdownTable, MarkdownTD, MarkdownTH, MarkdownTR
from textual.widgets.markdown import MarkdownBlock, MarkdownFence

from localllm.tui.text import plain
from localllm.tui.widgets.long_table import LongTable
from localllm.tui.widgets.one_layout import OneLayout

# $…$ as TeX has it: no space within the ends, no digit behind, so that prices are no maths.
_DOLLARS = re.compile(r"\$\$.+?\$\$|\$(?=[^\s$])[^$\n]*?(?<=[^\s\\])\$(?!\d)", re.DOTALL)
_BRACKETS = {"(": ")", "[": "]"}
MOST_CHARACTERS = 200_000  # longer answers are shown as plain text
MOST_CELLS = 120  # of a table whose cells are widgets


@cache
def parser() -> MarkdownIt:
    """Tables and struck text as GitHub has them; what would hide text or lead elsewhere is off.

    A link stays as it was written: the reader sees where it leads.
    """
    made = MarkdownIt("gfm-like", {"html": False, "linkify": False})
    made.disable(["link", "image", "autolink", "reference", "linkify", "entity"])
    made.inline.ruler.before("escape", "maths", _maths)
    return made


def _maths(state: StateInline, silent: bool) -> bool:
    """Maths as one piece: neither its underscores nor its backslashes are Markdown's."""
    source, start = state.src, state.pos
    end = 0
    if source[start] == "$":
        found = _DOLLARS.match(source, start, state.posMax)
        end = found.end() if found else 0
    elif source[start] == "\\" and source[start + 1 : start + 2] in ("(", "["):
        close = source.find("\\" + _BRACKETS[source[start + 1]], start + 2, state.posMax)
        end = close + 2 if close >= 0 else 0
    if not end:
        return False
    if not silent:
        token = state.push("code_inline", "code", 0)
        token.content = source[start:end]
    state.pos = end
    return True


class CopyCode(Static):
    """Copies the code below it."""

    DEFAULT_CSS = """
    CopyCode { width: auto; padding: 0 1; color: $text-muted; }
    CopyCode:hover { color: $text-accent; text-style: underline; }
    """

    def __init__(self) -> None:
        super().__init__("copy", markup=False)

    def on_click(self) -> None:
        fence = next((node for node in self.ancestors if isinstance(node, CodeBlock)), None)
        if fence is not None:
            self.app.copy_to_clipboard(fence.code)
            self.update("copied")
            self.set_timer(1.5, lambda: self.update("copy"))


class _Code(OneLayout, Label):
    pass


class CodeBlock(OneLayout, MarkdownFence):
    DEFAULT_CSS = """
    CodeBlock { margin: 0 0 1 0; background: $boost; }
    CodeBlock > HorizontalGroup { width: 100%; height: 1; background: $panel; }
    CodeBlock .language { width: 1fr; padding: 0 1; color: $text-muted; }
    CodeBlock > Label { padding: 0 1; }
    .-plain CodeBlock { background: transparent; }
    """

    def compose(self) -> ComposeResult:
        with HorizontalGroup():
            yield Static(self._language, classes="language", markup=False)
            yield CopyCode()
        yield _Code(self._highlighted_code, id="code-content", expand=True)

    @property
    def _language(self) -> str:
        words = plain(self.lexer or "").split()
        return words[0][:30] if words else "text"

    def set_content(self, content: Content) -> None:
        super().set_content(content)
        try:
            self.query_one(".language", Static).update(self._language)
        except NoMatches:
            return


class _Part:
    """Of a table, which reads its text and shows that: it is never mounted. To make it a widget
    all the same takes most of the time of every piece that a long table comes in."""

    def __init__(self, markdown: Markdown, token: Token) -> None:
        self._content = Content()
        self._blocks: list[MarkdownBlock] = []
        self._token = token
        self._inline_token: Token | None = None
        self.source_range = (0, 0)

    def set_content(self, content: Content) -> None:
        self._content = content


class _Cell(_Part, MarkdownTD):
    pass


class _Head(_Part, MarkdownTH):
    pass


class _Row(_Part, MarkdownTR):
    pass


class AnswerTable(OneLayout, MarkdownTable):
    """A table with a widget for each cell, as Textual has it, takes seconds to show from some
    hundred rows on; a longer one is one widget."""

    def compose(self) -> ComposeResult:
        headers, rows = self._headers, self._rows = self._get_headers_and_rows()
        if _cells(rows) > MOST_CELLS:
            yield LongTable(headers, rows)
        else:
            yield from super().compose()

    async def _update_from_block(self, block: MarkdownBlock) -> None:
        headers, rows = (
            block._get_headers_and_rows() if isinstance(block, MarkdownTable) else ([], [])
        )
        if _cells(rows) <= MOST_CELLS:
            await super()._update_from_block(block)
            return
        self._headers, self._rows = headers, rows
        if shown := self.query(LongTable):
            shown.first().show(headers, rows)
        else:
            await self.remove_children()
            await self.mount(LongTable(headers, rows))


def _cells(rows: list[list[Content]]) -> int:
    return sum(map(len, rows))


def _laid_out_once(block: type[MarkdownBlock]) -> type[MarkdownBlock]:
    return type(block.__name__, (OneLayout, block), {})


class AnswerMarkdown(OneLayout, Markdown):
    """Markdown of a model: it may say anything and lead nowhere."""

    DEFAULT_CSS = """
    AnswerMarkdown { padding: 0; margin: 0; background: transparent; }
    AnswerMarkdown MarkdownH1, AnswerMarkdown MarkdownH2, AnswerMarkdown MarkdownH3 {
        margin: 0 0 1 0; content-align: left middle; text-style: bold;
    }
    AnswerMarkdown MarkdownParagraph { margin: 0 0 1 0; }
    """
    BLOCKS = {  # noqa: RUF012
        **{name: _laid_out_once(block) for name, block in Markdown.BLOCKS.items()},
        "fence": CodeBlock,
        "code_block": CodeBlock,
        "table_open": AnswerTable,
        "td_open": _Cell,
        "th_open": _Head,
        "tr_open": _Row,
    }

    def __init__(self, text: str = "") -> None:
        super().__init__(text, parser_factory=parser, open_links=False)
