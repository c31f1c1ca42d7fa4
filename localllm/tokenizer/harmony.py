"""Tells apart what a gpt-oss model writes: every part of its answer goes to a channel.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>

The format is OpenAI's "harmony": https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import re
from typing import Literal

from localllm.tokenizer.base import Tokenizer
from localllm.tokenizer.call_bodies import MOST_CALLS, ToolCall, loads

FINAL = "<|channel|>final<|message|>"  # what an answer that is continued stands behind
MOST_CHARACTERS = 1 << 18  # of a call
_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_MARKS = ("<|channel|>", "<|constrain|>", _MESSAGE, *_ENDS)
# The prompt ends in "<|start|>assistant": whom it is for may come first.
_OPENINGS = ("<|start|>", "<|channel|>", "<|constrain|>", _MESSAGE, " to=")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_MOST_HEADER = 500  # characters
_STRANGE = "a message's header could not be read and is shown as text"


def harmony_ids(tokenizer: Tokenizer | None) -> frozenset[int]:
    """The control tokens to spell; empty for a model that does not write so."""
    if tokenizer is None or tokenizer.special_id("<|channel|>") is None:
        return frozenset()
    if "<|channel|>" not in (tokenizer.chat_template or ""):
        return frozenset()
    return channel_ids(tokenizer)


def channel_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The control tokens of the format that the vocabulary has."""
    found = (tokenizer.special_id(mark) for mark in _MARKS)
    return frozenset(token for token in found if token is not None)


class HarmonySplitter:
    """As `ThinkingSplitter`; `calls` has the functions it calls.

    continued: the text goes on with a final answer.
    plain: a call that cannot be read comes out as the text it is; else it is a `ToolCall` without
    arguments.
    """

    def __init__(self, *, continued: bool = False, plain: bool = False) -> None:
        self.calls: list[ToolCall] = []
        self.notes: list[str] = []
        self._plain = plain
        self._state: Literal["header", "body"] = "body" if continued else "header"
        self._channel = "final"
        self._recipient: str | None = None
        self._held = ""
        self._call = ""

    def feed(self, text: str) -> tuple[str, str]:
        self._held += text
        answer, thinking = "", ""
        while True:
            if self._state == "header":
                shown = self._header()
                if shown is None:
                    break
                answer += shown
            at, mark = self._end()
            more = self._put(self._held[:at])
            answer, thinking = answer + more[0], thinking + more[1]
            if mark is None:
                self._held = self._held[at:]
                break
            # <|start|> belongs to the next header.
            self._held = self._held[at + (0 if mark == "<|start|>" else len(mark)) :]
            answer += self._close()
            self._state = "header"
        return answer, thinking

    def finish(self) -> tuple[str, str]:
        """What was held back, now that no more comes."""
        held, self._held = self._held, ""
        if self._state == "header":
            if not held.startswith(("<|", " to=")):
                return held, ""
            self._note("the answer ended inside of a message's header")
            return "", ""
        answer, thinking = self._put(held)
        return answer + self._close(), thinking

    def _header(self) -> str | None:
        """Reads a header, if it is whole: text to show of one that is none, None to wait."""
        if not self._held.startswith(_OPENINGS):
            if any(mark.startswith(self._held) for mark in _OPENINGS):
                return None
            return self._begin("")  # text without a header is the final answer
        at = self._held.find(_MESSAGE)
        ends = [found for mark in _ENDS if (found := self._held.find(mark, 1)) >= 0]
        if ends and (at < 0 or min(ends) < at):
            self._note(_STRANGE)
            shown, self._held = self._held[: min(ends)], self._held[min(ends) :]
            self._begin("")
            return shown
        if at > _MOST_HEADER or (at < 0 and len(self._held) > _MOST_HEADER + len(_MESSAGE)):
            self._note(_STRANGE)
            return self._begin("")
        if at < 0:
            return None
        header, self._held = self._held[:at], self._held[at + len(_MESSAGE) :]
        return self._begin(header)

    def _begin(self, header: str) -> str:
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        self._channel = channel[1] if channel else "final"
        self._recipient = recipient[1] if recipient else None
        self._state, self._call = "body", ""
        return ""

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
        if self._recipient is None:
            return ("", text) if self._channel == "analysis" else (text, "")
        self._call += text
        if len(self._call) <= MOST_CHARACTERS:
            return "", ""
        self._note(f"a call of more than {MOST_CHARACTERS} characters is shown as text")
        self._recipient, self._channel = None, "final"
        return self._call, ""

    def _close(self) -> str:
        """Takes the call under way, if there is one; the text to show if it cannot be read."""
        name, self._recipient = self._recipient, None
        body, self._call = self._call, ""
        if name is None:
            return ""
        arguments = loads(body or "{}")
        if not isinstance(arguments, dict):
            if self._plain:
                self._note(f"a call of {name} could not be read and is shown as text")
                return body
            arguments = None
        if len(self.calls) < MOST_CALLS:
            self.calls.append(ToolCall(name, arguments, body))
        else:
            self._note(f"more than {MOST_CALLS} calls in one answer: the others are left out")
        return ""

    def _note(self, text: str) -> None:
        if text not in self.notes and len(self.notes) < MOST_CALLS:
            self.notes.append(text)
