"""What stands inside a function call's marks, read: JSON, tags, Python, and Gemma's own form.

Nothing is executed, whatever it says. Every reader gives None or an empty list for what it cannot
read, and is bounded by the text it is given.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

MOST_CALLS = 32  # of an answer
QUOTE = '<|"|>'  # around Gemma's strings
_DEEPEST = 64  # lists and mappings within each other
_ARGS = "[ARGS]"
_NAMES = ("name", "function", "tool", "tool_name")
_ARGUMENTS = ("arguments", "parameters", "args", "input")
FIRST_KEYS = frozenset({*_NAMES, *_ARGUMENTS, "type", "id"})
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL
)
_NAME = r"[A-Za-z_][\w.-]*"
_NAMED_TAGS = re.compile(rf"({_NAME})\s*((?:<arg_key>.*)?)\Z", re.DOTALL)
_PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
_GEMMA_CALL = re.compile(rf"\s*call:\s*({_NAME})\s*(?=\{{)")
_GEMMA_KEY = re.compile(r"\s*([^\s:,{}\[\]]+)\s*:")
_GEMMA_WORD = re.compile(r"[^,{}\[\]]+")


@dataclass(frozen=True)
class ToolCall:
    """arguments: None where what was written is no call that can be read; `raw` has it."""

    name: str
    arguments: Mapping[str, Any] | None
    raw: str = ""


def read_calls(body: str, known: Collection[str] = ()) -> list[ToolCall]:
    """The calls that a text spells; empty if it is no call. A name alone has to be a known one."""
    text = body.strip()
    if text.startswith("<function="):
        return [_from_tags(match) for match in _FUNCTION.finditer(text)][:MOST_CALLS]
    if (match := _NAMED_TAGS.match(text)) and (match[2] or match[1] in known):
        arguments = _pairs(match[2])
        return [] if arguments is None else [ToolCall(match[1], arguments, text)]
    if _ARGS in text:
        return _with_args(text)
    calls: list[ToolCall] = []
    for value, raw in _values(text):
        for one in value if isinstance(value, list) else [value]:
            call = _from_json(one, raw)
            if call is None:
                return []
            calls.append(call)
    if not calls and (match := re.match(rf"({_NAME})\s*(\{{.*)\Z", text, re.DOTALL)):
        parsed = loads(match[2])  # NAME{…}, as Mistral writes it without its mark
        if isinstance(parsed, dict):
            return [ToolCall(match[1], parsed, text)]
    return calls


def read_python(body: str, known: Collection[str] = ()) -> list[ToolCall]:
    """[name(key=literal, …), …] as LFM2 writes it, or JSON. Parsed, never evaluated."""
    text = body.strip()
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in strings
            tree = ast.parse(text, mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        calls = []
        for node in nodes:
            if not isinstance(node, ast.Call) or node.args:
                return read_calls(text)
            arguments = {}
            for pair in node.keywords:
                if pair.arg is None:
                    return []
                arguments[pair.arg] = _literal(pair.value, 0)
            raw = ast.get_source_segment(text, node) or text
            calls.append(ToolCall(_dotted(node.func), arguments, raw))
        return calls
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return read_calls(text)


def read_gemma(body: str, known: Collection[str] = ()) -> list[ToolCall]:
    """call:NAME{key:value, …}, where strings stand between <|"|> marks, as Gemma 4 writes it."""
    match = _GEMMA_CALL.match(body)
    if match is None:
        return read_calls(body)
    try:
        value, end = _gemma_value(body, match.end(), 0)
    except ValueError:
        return []
    if not isinstance(value, dict) or body[end:].strip():
        return []
    return [ToolCall(match[1], value, body.strip())]


def loads(text: str) -> Any:
    """The JSON value of a text, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ---- JSON


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
        given = loads(given)
    return ToolCall(name, given if isinstance(given, dict) else None, raw)


def _with_args(text: str) -> list[ToolCall]:
    name, _, rest = text.partition(_ARGS)
    parsed = loads(rest)
    return [ToolCall(name.strip(), parsed if isinstance(parsed, dict) else None, text)]


# ---- tags


def _from_tags(match: re.Match[str]) -> ToolCall:
    body = match[2].strip()
    if body.startswith("{"):  # <function=NAME>{…}</function>
        parsed = loads(body)
        given = parsed if isinstance(parsed, dict) else None
        return ToolCall(match[1].strip(), given, match[0])
    arguments = {name.strip(): _untyped(value) for name, value in _PARAMETER.findall(match[2])}
    return ToolCall(match[1].strip(), arguments, match[0])


def _pairs(text: str) -> dict[str, Any] | None:
    """<arg_key>…</arg_key><arg_value>…</arg_value> again and again; None for anything else."""
    arguments, at = {}, 0
    while at < len(text):
        match = _PAIR.match(text, at)
        if match is None:
            return None
        arguments[match[1].strip()] = _untyped(match[2])
        at = match.end()
    return arguments


def _untyped(text: str) -> Any:
    """Texts are not quoted inside of tags; what reads as JSON of another type is that."""
    parsed = loads(text)
    return text if parsed is None or isinstance(parsed, str) else parsed


# ---- Python


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError("no name")


def _literal(node: ast.expr, depth: int) -> Any:
    """What JSON can say too. Raises ValueError for anything else."""
    if depth > _DEEPEST:
        raise ValueError("too deep")
    match node:
        case ast.Constant(str() | bool() | int() | None):
            return node.value
        case ast.Constant(float() as number) if math.isfinite(number):
            return number
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)):
            return -number
        case ast.Name("true" | "false" | "null" as word):  # mappings are written as JSON
            return {"true": True, "false": False, "null": None}[word]
        case ast.List(items) | ast.Tuple(items):
            return [_literal(item, depth + 1) for item in items]
        case ast.Dict(keys, values):
            pairs = {}
            for key, value in zip(keys, values, strict=True):
                if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                    raise ValueError("no text as a key")
                pairs[key.value] = _literal(value, depth + 1)
            return pairs
    raise ValueError("no literal")


# ---- Gemma


def _gemma_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """A value and the place after it. Raises ValueError where there is none."""
    at = _skip(text, at)
    if depth > _DEEPEST or at >= len(text):
        raise ValueError("too deep, or cut short")
    if text.startswith(QUOTE, at):
        end = text.index(QUOTE, at + len(QUOTE))
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text[at] == "{":
        return _gemma_pairs(text, at + 1, depth)
    if text[at] == "[":
        return _gemma_items(text, at + 1, depth)
    if text[at] == '"':
        value, end = json.JSONDecoder().raw_decode(text, at)
        return value, end
    match = _GEMMA_WORD.match(text, at)
    if match is None:
        raise ValueError("no value")
    word = match[0].strip()
    parsed = loads(word)
    if parsed is None and word not in ("null", "None"):
        raise ValueError("no value")
    return parsed, match.end()


def _gemma_pairs(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    pairs: dict[str, Any] = {}
    if text.startswith("}", _skip(text, at)):
        return pairs, _skip(text, at) + 1
    while True:
        at = _skip(text, at)
        if text.startswith(QUOTE, at):
            end = text.index(QUOTE, at + len(QUOTE))
            key, at = text[at + len(QUOTE) : end], _skip(text, end + len(QUOTE))
            if text[at : at + 1] != ":":
                raise ValueError("no value")
            at += 1
        else:
            match = _GEMMA_KEY.match(text, at)
            if match is None:
                raise ValueError("no key")
            key, at = match[1].strip('"'), match.end()
        pairs[key], at = _gemma_value(text, at, depth + 1)
        at = _skip(text, at) + 1
        if text[at - 1 : at] == "}":
            return pairs, at
        if text[at - 1 : at] != ",":
            raise ValueError("neither more nor an end")


def _gemma_items(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    items: list[Any] = []
    if text.startswith("]", _skip(text, at)):
        return items, _skip(text, at) + 1
    while True:
        value, at = _gemma_value(text, at, depth + 1)
        items.append(value)
        at = _skip(text, at) + 1
        if text[at - 1 : at] == "]":
            return items, at
        if text[at - 1 : at] != ",":
            raise ValueError("neither more nor an end")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
