"""Function calls in what a model writes, told from its text while both stream by.

Every family has a way of its own to write a call:

    <tool_call>{"name": …, "arguments": {…}}</tool_call>      Hermes, Qwen, SmolLM3
    <tool_call><function=NAME><parameter=P>…</parameter></function></tool_call>     Qwen3 Coder
    [TOOL_CALLS][{"name": …, "arguments": {…}}, …]            Mistral
    [TOOL_CALLS]NAME[ARGS]{…}                                 Mistral since 2025
    <|python_tag|>{"name": …, "parameters": {…}}              Llama 3
    <|tool_call|>[{"name": …, "arguments": {…}}]              Granite, Phi 4
    {"name": …, "arguments": {…}}                             the whole answer, maybe in a fence
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from localllm.tokenizer.base import Tokenizer

MOST_CALLS = 32  # of an answer
MOST_CHARACTERS = 1 << 18  # of a call


@dataclass(frozen=True)
class ToolCall:
    """arguments: None where what was written is no call that can be read; `raw` has it."""

    name: str
    arguments: Mapping[str, Any] | None
    raw: str = ""


# Opening mark -> what ends the call; None where the end of its JSON does.
_MARKS: Mapping[str, str | None] = {
    "<tool_call>": "</tool_call>",
    "<|tool_call|>": None,
    "[TOOL_CALLS]": None,
    "<|python_tag|>": None,
}
_ARGS = "[ARGS]"
_ENDS = ("</tool_call>", "<|/tool_call|>")  # of no meaning beside a call that has ended
_NAMES = ("name", "function", "tool", "tool_name")
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_FIRST_KEYS = frozenset({*_NAMES, *_ARGUMENTS, "type", "id"})
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL
)
_FENCE = re.compile(r"```[a-z_]*\n?")
_FENCE_SO_FAR = re.compile(r"`{1,2}\Z|```[a-z_]*\n?\Z")
_KEY = re.compile(r'[\[\s]*\{\s*"((?:[^"\\]|\\.)*)"')
_KEY_SO_FAR = re.compile(r'[\[\s]*(?:\{\s*(?:"(?:[^"\\]|\\.)*\\?)?)?\Z')


def mark_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The control tokens that mark calls: without them in the text, none would be found."""
    found = (tokenizer.special_id(mark) for mark in (*_MARKS, _ARGS, *_ENDS))
    return frozenset(token for token in found if token is not None)


class ToolCallParser:
    """Text in pieces goes in, what is no call comes out; `calls` grows.

    known: names of functions there are. An answer that is bare JSON is a call only if it names one
    of these; a mark makes a call of any name.
    """

    def __init__(self, known: Collection[str] = ()) -> None:
        self.calls: list[ToolCall] = []
        self._known = frozenset(known)
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
            self._add(held)
            return ""
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
        if any(mark.startswith(stripped) and mark != stripped for mark in _MARKS):
            return None
        marked = any(stripped.startswith(mark) for mark in _MARKS)
        if body[0] in "{[" and not marked and self._known:
            key = _KEY.match(body)
            if key is None and _KEY_SO_FAR.match(body):
                return None
            if key is not None and key[1] in _FIRST_KEYS:
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
        places = [(at, mark) for mark in _MARKS if (at := self._held.find(mark)) >= 0]
        if places:
            at, self._mark = min(places)
            before, self._held = self._held[:at], self._held[at + len(self._mark) :]
            self._state, self._scan = "call", _JsonScan()
            return before.rstrip()
        keep = _undecided(self._held, _MARKS)
        kept = self._held[len(self._held) - keep :]
        free = self._held[: len(self._held) - keep]
        out = free.rstrip()  # white space before a call is no text
        self._held = free[len(out) :] + kept
        return out or None

    def _in_call(self) -> str | None:
        end = self._end_of_call()
        if end is None:
            if len(self._held) <= MOST_CHARACTERS:
                return None
            end = len(self._held)
        body, self._held = self._held[:end], self._held[end:]
        self._add(body)
        self._state = "after"
        return ""

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
        close = _MARKS[self._mark]
        begin = self._begin_of_json()
        if close is not None:
            at = self._held.find(close)
            if at >= 0 and (begin is None or begin > at or "<function=" in self._held[:begin]):
                return at
            if "<function=".startswith(self._held.lstrip()[: len("<function=")]):
                return None
        if begin is None:
            return None
        self._scan.begin_at(begin)
        return self._scan.end(self._held, close)

    def _begin_of_json(self) -> int | None:
        for at, character in enumerate(self._held):
            if character in "{[" and not _ARGS.startswith(self._held[at : at + len(_ARGS)]):
                return at
        return None

    def _add(self, body: str) -> None:
        found = _parse(body)
        for call in found or [ToolCall("", None, body.strip())]:
            if len(self.calls) < MOST_CALLS:
                self.calls.append(call)

    def _bare(self, text: str) -> bool:
        """Whether the whole text is calls of functions there are, which are then taken."""
        fence = _FENCE.match(text.lstrip())
        body = text.lstrip()[fence.end() :] if fence else text
        found = _parse(body.strip().removesuffix("```"))
        if not found or any(call.name not in self._known for call in found):
            return False
        self.calls += found[:MOST_CALLS]
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


def _parse(body: str) -> list[ToolCall]:
    """The calls that a text spells; empty if it is no call."""
    text = body.strip()
    if text.startswith("<function="):
        return [_from_tags(match) for match in _FUNCTION.finditer(text)][:MOST_CALLS]
    if _ARGS in text:
        return _with_args(text)
    calls: list[ToolCall] = []
    for value, raw in _values(text):
        for one in value if isinstance(value, list) else [value]:
            call = _from_json(one, raw)
            if call is None:
                return []
            calls.append(call)
    if not calls and (match := re.match(r"([A-Za-z_][\w.-]*)\s*(\{.*)\Z", text, re.DOTALL)):
        parsed = _loads(match[2])  # NAME{…}, as Mistral writes it without its mark
        if isinstance(parsed, dict):
            return [ToolCall(match[1], parsed, text)]
    return calls


def _values(text: str) -> list[tuple[Any, str]]:
    """The JSON values that a text consists of, ; or white space between them; [] for any other."""
    found, at = [], 0
    decoder = json.JSONDecoder()
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        found.append((value, text[at:end]))
        at = end
        while at < len(text) and text[at] in " \t\r\n;":
            at += 1
    return found


def _from_json(value: Any, raw: str) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    if isinstance(inner, dict):  # OpenAI's form
        value = inner
    name = next((value[key] for key in _NAMES if isinstance(value.get(key), str)), None)
    if not name:
        return None
    given: Any = next((value[key] for key in _ARGUMENTS if value.get(key) is not None), {})
    if isinstance(given, str):
        given = _loads(given)
    return ToolCall(name, given if isinstance(given, dict) else None, raw)


def _from_tags(match: re.Match[str]) -> ToolCall:
    body = match[2].strip()
    if body.startswith("{"):  # <function=NAME>{…}</function>
        parsed = _loads(body)
        given = parsed if isinstance(parsed, dict) else None
        return ToolCall(match[1].strip(), given, match[0])
    arguments: dict[str, Any] = {}
    for name, value in _PARAMETER.findall(match[2]):
        parsed = _loads(value)
        # Texts are not quoted in this form; what reads as JSON of another type is that.
        arguments[name.strip()] = value if parsed is None or isinstance(parsed, str) else parsed
    return ToolCall(match[1].strip(), arguments, match[0])


def _with_args(text: str) -> list[ToolCall]:
    name, _, rest = text.partition(_ARGS)
    parsed = _loads(rest)
    return [ToolCall(name.strip(), parsed if isinstance(parsed, dict) else None, text)]


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _undecided(text: str, marks: Collection[str]) -> int:
    """Length of the longest end of `text` that begins a mark."""
    for length in range(min(len(text), max(map(len, marks)) - 1), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
