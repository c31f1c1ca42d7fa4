"""Function calls in what a model writes, told from its text while both stream by.

Every family has a way of its own to write a call:

    <tool_call>{"name": …, "arguments": {…}}</tool_call>      Hermes, Qwen 3, SmolLM3
    <tool_call><function=NAME><parameter=P>…</parameter></function></tool_call>     Qwen 3.5, Coder
    <tool_call>NAME<arg_key>P</arg_key><arg_value>…</arg_value></tool_call>         GLM 4.5
    <|tool_call>call:NAME{P:<|"|>…<|"|>}<tool_call|>          Gemma 4
    <|tool_call_start|>[NAME(P=…)]<|tool_call_end|>           LFM2
    [TOOL_CALLS][{"name": …, "arguments": {…}}, …]            Mistral
    [TOOL_CALLS]NAME[ARGS]{…}                                 Mistral since 2025
    <|python_tag|>{"name": …, "parameters": {…}}              Llama 3
    <|tool_call|>[{"name": …, "arguments": {…}}]              Granite, Phi 4
    {"name": …, "arguments": {…}}                             the whole answer, maybe in a fence
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal

from localllm.tokenizer.base import Tokenizer
from localllm.tokenizer.call_bodies import (
    FIRST_KEYS,
    MOST_CALLS,
    QUOTE,
    ToolCall,
    read_calls,
    read_gemma,
    read_python,
)

__all__ = ["MARKS", "MOST_CALLS", "MOST_CHARACTERS", "ToolCall", "ToolCallParser", "mark_ids"]

MOST_CHARACTERS = 1 << 18  # of a call

# Opening mark -> what ends the call; None where the end of its JSON does.
MARKS: Mapping[str, str | None] = {
    "<tool_call>": "</tool_call>",
    "<|tool_call>": "<tool_call|>",
    "<|tool_call_start|>": "<|tool_call_end|>",
    "<|tool_call|>": None,
    "[TOOL_CALLS]": None,
    "<|python_tag|>": None,
}
_ARGS = "[ARGS]"
_ENDS = ("</tool_call>", "<tool_call|>", "<|tool_call_end|>", "<|/tool_call|>")
_INSIDE = (QUOTE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_READERS = {"<|tool_call_start|>": read_python, "<|tool_call>": read_gemma}
_LONGEST_END = max(map(len, _ENDS))
# A name with tags after it, or where JSON begins: [ARGS] is a mark, whole or on its way.
_KEYED = re.compile(r"\s*[A-Za-z_][\w.-]*\s*<arg_key>")
_JSON_BEGIN = re.compile(r"\{|\[(?!\Z|A\Z|AR\Z|ARG\Z|ARGS\Z|ARGS\])")
_FENCE = re.compile(r"```[a-z_]*\n?")
_FENCE_SO_FAR = re.compile(r"`{1,2}\Z|```[a-z_]*\n?\Z")
_KEY = re.compile(r'[\[\s]*\{\s*"((?:[^"\\]|\\.)*)"')
_KEY_SO_FAR = re.compile(r'[\[\s]*(?:\{\s*(?:"(?:[^"\\]|\\.)*\\?)?)?\Z')


def mark_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The control tokens that mark calls: without them in the text, none would be found."""
    found = (tokenizer.special_id(mark) for mark in (*MARKS, _ARGS, *_ENDS, *_INSIDE))
    return frozenset(token for token in found if token is not None)


class ToolCallParser:
    """Text in pieces goes in, what is no call comes out; `calls` grows, and `notes` with what went
    wrong.

    known: names of functions there are. An answer that is bare JSON is a call only if it names one
    of these; a mark makes a call of any name.
    marks: of `MARKS`, those that open a call.
    plain: a call that cannot be read comes out as the text it is; else it is a `ToolCall` without
    arguments.
    """

    def __init__(
        self,
        known: Collection[str] = (),
        *,
        marks: Collection[str] = tuple(MARKS),
        plain: bool = False,
    ) -> None:
        self.calls: list[ToolCall] = []
        self.notes: list[str] = []
        self._known = frozenset(known)
        self._marks = tuple(marks)
        self._plain = plain
        self._space = ""  # before the call under way
        self._state: Literal["start", "json", "text", "call", "after"] = "start"
        self._held = ""  # not yet given out
        self._mark = ""  # that opened the call under way
        self._scan = _JsonScan()

    def feed(self, text: str) -> str:
        """The text that is surely no part of a call."""
        self._held += text
        out = ""
        while (step := self._step()) is not None:
            out += step
        return out

    def finish(self) -> str:
        """What was held back and is no call, now that no more comes."""
        held, state = self._held, self._state
        self._held, self._state = "", "text"
        if state == "call":
            return self._add(held)
        if state == "json" and self._bare(held):
            return ""
        if state == "after":
            return ""
        return held.rstrip() if self.calls else held

    # ---- states: each returns text to give out, None to wait for more

    def _step(self) -> str | None:
        match self._state:
            case "start":
                return self._in_start()
            case "json":
                return self._in_json()
            case "text":
                return self._in_text()
            case "call":
                return self._in_call()
            case "after":
                return self._after_call()

    def _in_start(self) -> str | None:
        """Nothing but white space so far: bare JSON may begin here."""
        stripped = self._held.lstrip()
        if not stripped:
            return None
        fence = _FENCE.match(stripped)
        body = stripped[fence.end() :].lstrip() if fence else stripped
        if _FENCE_SO_FAR.match(stripped) or (fence and not body):
            return None
        if any(mark.startswith(stripped) and mark != stripped for mark in self._marks):
            return None
        marked = any(stripped.startswith(mark) for mark in self._marks)
        if body[0] in "{[" and not marked and self._known:
            key = _KEY.match(body)
            if key is None and _KEY_SO_FAR.match(body):
                return None
            if key is not None and key[1] in FIRST_KEYS:
                self._state = "json"
                self._scan = _JsonScan(len(self._held) - len(body))
                return ""
        self._state = "text"
        return ""

    def _in_json(self) -> str | None:
        end = self._scan.end(self._held)
        if end is None:
            if len(self._held) <= MOST_CHARACTERS:
                return None
        elif self._held[end:].strip(" \n;`") == "" and len(self._held) - end < 64:
            return None  # another may follow, or a word that makes it text
        elif self._held[end:].lstrip(" \n;")[:1] in ("{", "["):
            rest = self._held[end:]
            skipped = len(rest) - len(rest.lstrip(" \n;"))
            self._scan = _JsonScan(end + skipped)
            return ""
        self._state = "text"
        return ""

    def _in_text(self) -> str | None:
        places = [(at, mark) for mark in self._marks if (at := self._held.find(mark)) >= 0]
        if places:
            at, self._mark = min(places)
            before, self._held = self._held[:at], self._held[at + len(self._mark) :]
            self._state, self._scan = "call", _JsonScan()
            out = before.rstrip()
            self._space = before[len(out) :]
            return out
        keep = _undecided(self._held, self._marks)
        kept = self._held[len(self._held) - keep :]
        free = self._held[: len(self._held) - keep]
        out = free.rstrip()  # white space before a call is no text
        self._held = free[len(out) :] + kept
        return out or None

    def _in_call(self) -> str | None:
        end = self._end_of_call()
        if end is None and len(self._held) <= MOST_CHARACTERS + _LONGEST_END:
            return None
        end = MOST_CHARACTERS if end is None else min(end, MOST_CHARACTERS)
        body, self._held = self._held[:end], self._held[end:]
        shown = self._add(body)
        self._state = "text" if shown else "after"
        return shown

    def _after_call(self) -> str | None:
        """A closing mark; for one family also the next call, which has no mark of its own."""
        rest = self._held.lstrip(" \n;")
        if not rest or any(end.startswith(rest) and end != rest for end in _ENDS):
            return None
        self._state = "text"
        if self._mark == "<|python_tag|>" and rest[0] == "{":
            self._held, self._state, self._scan = rest, "call", _JsonScan()
        for end in _ENDS:
            if rest.startswith(end):
                self._held = rest.removeprefix(end)
        return ""

    # ---- inside

    def _end_of_call(self) -> int | None:
        """Where its JSON ends, or its closing mark stands outside of a string."""
        close = MARKS[self._mark]
        if close is not None and self._mark in _READERS:
            at = self._held.find(close)
            while at >= 0 and self._held.count(QUOTE, 0, at) % 2:  # inside of a string
                at = self._held.find(close, at + 1)
            return at if at >= 0 else None
        match = _JSON_BEGIN.search(self._held)
        begin = None if match is None else match.start()
        if close is not None:
            at = self._held.find(close)
            tags = "<function=" in self._held[:begin] or _KEYED.match(self._held) is not None
            if at >= 0 and (begin is None or begin > at or tags):
                return at
            if tags or "<function=".startswith(self._held.lstrip()[: len("<function=")]):
                return None
        if begin is None:
            return None
        self._scan.begin_at(begin)
        return self._scan.end(self._held, close)

    def _add(self, body: str) -> str:
        """Takes the calls of a body; the text to show if they cannot be read."""
        found = _READERS.get(self._mark, read_calls)(body, self._known)
        unreadable = not found or any(call.arguments is None for call in found)
        if self._plain and unreadable:
            self._note(f"a call could not be read and is shown as text: {body.strip()[:80]!r}")
            return self._space + self._mark + body
        self._take(found or [ToolCall("", None, body.strip())])
        return ""

    def _take(self, found: list[ToolCall]) -> None:
        room = MOST_CALLS - len(self.calls)
        if len(found) > room:
            self._note(f"more than {MOST_CALLS} calls in one answer: the others are left out")
        self.calls += found[:room]

    def _note(self, text: str) -> None:
        if text not in self.notes and len(self.notes) < MOST_CALLS:
            self.notes.append(text)

    def _bare(self, text: str) -> bool:
        """Whether the whole text is calls of functions there are, which are then taken."""
        fence = _FENCE.match(text.lstrip())
        body = text.lstrip()[fence.end() :] if fence else text
        found = read_calls(body.strip().removesuffix("```"))
        if not found or any(call.name not in self._known for call in found):
            return False
        self._take(found)
        return True


class _JsonScan:
    """Finds where an object or array ends, reading every character once."""

    def __init__(self, start: int = -1) -> None:
        self._at = start
        self._depth = 0
        self._end: int | None = None
        self._string = self._escaped = False

    def begin_at(self, start: int) -> None:
        if self._at < 0:
            self._at = start

    def end(self, text: str, close: str | None = None) -> int | None:
        """The place after it, None while it is open. close: a mark that ends it, outside of a
        string, whatever is open."""
        while self._end is None and self._at < len(text):
            character = text[self._at]
            if close is not None and not self._string and character == close[0]:
                if text.startswith(close, self._at):
                    self._end = self._at
                    break
                if close.startswith(text[self._at :]):
                    break  # more has to come before anyone knows
            self._at += 1
            if self._string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._string = False
            elif character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._end = self._at
        return self._end


def _undecided(text: str, marks: Collection[str]) -> int:
    """Length of the longest end of `text` that begins a mark."""
    for length in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
