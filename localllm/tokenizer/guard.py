"""Keep text that merely spells a control token from becoming one.

A template writes control tokens; the conversation must not. Before rendering, every control
token spelled inside the conversation's texts is disguised: its characters are replaced, one by
one, by private characters that occur nowhere in the conversation. The template handles them as
ordinary characters (it may trim, split, join or quote the text around them); after rendering
they mark what is not to be parsed, and are turned back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from localllm.tokenizer.matching import SpecialMatcher

# Plane 16, a private use area; `template.tojson` leaves it unescaped.
PRIVATE = range(0x100000, 0x10FFFE)


class Disguise:
    """A bijection between the characters of control tokens and private stand-ins."""

    def __init__(self, chars: set[str], avoid: set[str]) -> None:
        # Spaces and what JSON escapes stay, so that trimming and quoting work as ever.
        hidden = sorted(c for c in chars if not c.isspace() and c.isprintable() and c not in '"\\')
        free = (chr(point) for point in PRIVATE if chr(point) not in avoid)
        pairs = list(zip(hidden, free, strict=False))
        self._on = {ord(char): private for char, private in pairs}
        self._off = {ord(private): char for char, private in pairs}

    def put_on(self, text: str) -> str:
        return text.translate(self._on)

    def take_off(self, text: str) -> str:
        return text.translate(self._off)


class Guard:
    """Disguises what a conversation must not smuggle in."""

    def __init__(self, matcher: SpecialMatcher) -> None:
        self._matcher = matcher

    def disguise_for(self, conversation: Any) -> Disguise:
        seen: set[str] = set()
        for text in _texts(conversation):
            if not text.isascii():
                seen.update(text)
        return Disguise(self._chars, seen)

    def spells_token(self, conversation: Any) -> bool:
        """Whether some text spells a whole control token."""
        return any(next(self._matcher.find(text), None) for text in _texts(conversation))

    def has_loose_end(self, conversation: Any) -> bool:
        """Whether some text begins or ends like part of a control token.

        Set side by side by a template, two such texts could spell one.
        """
        return any(self._loose(text) != (0, 0) for text in _texts(conversation))

    def hide_tokens(self, conversation: Any, disguise: Disguise) -> Any:
        """A copy of the conversation with whole control tokens disguised."""

        def hide(text: str) -> str:
            parts = []
            done = 0
            for start, end, _ in self._matcher.find(text):
                parts += [text[done:start], disguise.put_on(text[start:end])]
                done = end
            return "".join([*parts, text[done:]]) if parts else text

        return _map_texts(conversation, hide)

    def hide_loose_ends(self, conversation: Any, disguise: Disguise) -> Any:
        """A copy of the conversation with such beginnings and ends disguised."""

        def hide(text: str) -> str:
            head, tail = self._loose(text)
            lead = len(text) - len(text.lstrip())
            text = text[:lead] + disguise.put_on(text[lead : lead + head]) + text[lead + head :]
            stop = len(text.rstrip())
            return text[: stop - tail] + disguise.put_on(text[stop - tail : stop]) + text[stop:]

        return _map_texts(conversation, hide)

    def _loose(self, text: str) -> tuple[int, int]:
        """Characters at the beginning and end (spaces aside) that are part of a control token."""
        core = text.strip()
        head = next((n for n in self._lengths if core[:n] in self._suffixes), 0)
        tail = next((n for n in self._lengths if core[-n:] in self._prefixes), 0)
        return min(head, len(core)), min(tail, len(core))

    @cached_property
    def _chars(self) -> set[str]:
        return set().union(*self._matcher.special)

    @cached_property
    def _lengths(self) -> range:
        return range(max(map(len, self._matcher.special), default=1) - 1, 0, -1)

    @cached_property
    def _prefixes(self) -> set[str]:
        return {text[:n] for text in self._matcher.special for n in range(1, len(text))}

    @cached_property
    def _suffixes(self) -> set[str]:
        return {text[n:] for text in self._matcher.special for n in range(1, len(text))}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_texts(k, change): _map_texts(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_map_texts(item, change) for item in value])
    return value
