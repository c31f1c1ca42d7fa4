"""Tells apart what a gpt-oss model writes: every part of its answer goes to a channel.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>

The format is OpenAI's "harmony": https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import json
import re
from typing import Literal

from localllm.tokenizer import Tokenizer
from localllm.tokenizer.tool_calls import MOST_CALLS, ToolCall

FINAL = "<|channel|>final<|message|>"  # what an answer that is continued stands behind
_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_MARKS = ("<|channel|>", "<|constrain|>", _MESSAGE, *_ENDS)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_MOST_HEADER = 500  # characters


def harmony_ids(tokenizer: Tokenizer | None) -> frozenset[int]:
    """The control tokens to spell; empty for a model that does not write so."""
    if tokenizer is None or tokenizer.special_id("<|channel|>") is None:
        return frozenset()
    if "<|channel|>" not in (tokenizer.chat_template or ""):
        return frozenset()
    found = (tokenizer.special_id(mark) for mark in _MARKS)
    return frozenset(token for token in found if token is not None)


class HarmonySplitter:
    """As `ThinkingSplitter`; `calls` has the functions it calls.

    continued: the text goes on with a final answer.
    """

    def __init__(self, *, continued: bool = False) -> None:
        self.calls: list[ToolCall] = []
        self._state: Literal["header", "body"] = "body" if continued else "header"
        self._channel = "final"
        self._recipient: str | None = None
        self._held = ""
        self._call = ""

    def feed(self, text: str) -> tuple[str, str]:
        self._held += text
        answer, thinking = "", ""
        while True:
            if self._state == "header" and not self._header():
                break
            at, mark = self._end()
            more = self._put(self._held[:at])
            answer, thinking = answer + more[0], thinking + more[1]
            if mark is None:
                self._held = self._held[at:]
                break
            # <|start|> belongs to the next header.
            self._held = self._held[at + (0 if mark == "<|start|>" else len(mark)) :]
            self._close()
            self._state = "header"
        return answer, thinking

    def finish(self) -> tuple[str, str]:
        """What was held back, now that no more comes."""
        held, self._held = self._held, ""
        if self._state == "header":
            return ("", "") if held.startswith(("<|", " to=")) else (held, "")
        out = self._put(held)
        self._close()
        return out

    def _header(self) -> bool:
        """Reads a header, if it is whole. Text without one is the final answer."""
        at = self._held.find(_MESSAGE)
        if at < 0:
            # The prompt ends in "<|start|>assistant": whom it is for may come first.
            begins = any(
                self._held.startswith(mark) or mark.startswith(self._held)
                for mark in (*_MARKS, " to=")
            )
            if begins and len(self._held) <= _MOST_HEADER:
                return False
            self._channel, self._recipient = "final", None
        else:
            header = self._held[:at]
            channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
            self._channel = channel[1] if channel else "final"
            self._recipient = recipient[1] if recipient else None
            self._held = self._held[at + len(_MESSAGE) :]
        self._state, self._call = "body", ""
        return True

    def _end(self) -> tuple[int, str | None]:
        """Where the body ends, and by which mark; None if it goes on, from where it is unsure."""
        found = [(at, mark) for mark in _ENDS if (at := self._held.find(mark)) >= 0]
        if found:
            return min(found)
        for length in range(min(len(self._held), max(map(len, _ENDS)) - 1), 0, -1):
            if any(mark.startswith(self._held[-length:]) for mark in _ENDS):
                return len(self._held) - length, None
        return len(self._held), None

    def _put(self, text: str) -> tuple[str, str]:
        if self._recipient is not None:
            self._call += text
            return "", ""
        return ("", text) if self._channel == "analysis" else (text, "")

    def _close(self) -> None:
        if self._recipient is None or len(self.calls) >= MOST_CALLS:
            self._recipient = None
            return
        try:
            arguments = json.loads(self._call or "{}")
        except (ValueError, RecursionError):
            arguments = None
        given = arguments if isinstance(arguments, dict) else None
        self.calls.append(ToolCall(self._recipient, given, self._call))
        self._recipient, self._call = None, ""
