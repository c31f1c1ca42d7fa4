"""A tool's call and what came of it, folded in the transcript."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from textual.content import Content
from textual.widgets import Collapsible, Static

from localllm.tui.text import plain
from localllm.tui.widgets.approval import shown_json

_MOST = 20_000
_BRIEF = 60


class ToolResult(Collapsible):
    """state: "running", "done", "refused" or "failed"; result: None until there is one."""

    DEFAULT_CSS = """
    ToolResult { border: none; padding: 0 0 0 1; background: $surface; height: auto; }
    ToolResult .arguments { color: $text-muted; height: auto; }
    ToolResult .result { height: auto; }
    ToolResult.-failed CollapsibleTitle { color: $text-error; }
    ToolResult.-refused CollapsibleTitle { color: $text-warning; }
    """

    def __init__(
        self,
        tool: str,
        arguments: Mapping[str, Any],
        result: str | None = None,
        *,
        state: str = "running",
        id: str | None = None,
    ) -> None:
        self._tool, self._arguments = tool, arguments
        self._arguments_text = Static(shown_json(arguments), classes="arguments", markup=False)
        self._result_text = Static("", classes="result", markup=False)
        super().__init__(self._arguments_text, self._result_text, title="", id=id)
        self.say(result, state)

    def say(self, result: str | None, state: str) -> None:
        """What came of the call."""
        # Content, not a string, which would be read as markup.
        line = Content(tool_line(self._tool, self._arguments, result, state))
        self.title = line  # type: ignore[assignment]
        for name in ("failed", "refused"):
            self.set_class(state == name, f"-{name}")
        text = plain(result or "")
        if len(text) > _MOST:
            text = f"{text[:_MOST]}\n… and {len(text) - _MOST:,} characters more"
        self._result_text.update(text)


def tool_line(tool: str, arguments: Mapping[str, Any], result: str | None, state: str) -> str:
    """One line: the call, and the beginning of its result."""
    given = ", ".join(f"{name}={json.dumps(value)}" for name, value in arguments.items())
    call = plain(f"{tool}({_brief(given)})").replace("\n", " ")
    if state == "running":
        return f"{call} …"
    if state == "refused":
        return f"{call}: refused"
    told = _brief(plain(result or "").replace("\n", " "))
    return f"{call}: {'failed: ' if state == 'failed' else ''}{told}"


def _brief(text: str) -> str:
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 1]}…"
