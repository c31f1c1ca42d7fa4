"""Find control tokens in text: leftmost, then longest, as the reference tokenizers do."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from localllm.errors import TokenizerError

Trie = dict[str, "Trie"]
_WORD = re.compile(r"\w")
_END = ""  # the key that marks a complete word


class SpecialMatcher:
    """Cuts text at the control tokens it spells.

    `other` holds further texts that the algorithm matches whole. They stay text, but a control
    token that begins inside one of them is not a match. `whole_words` are the ids of tokens that
    only match where no letter or digit touches them.
    """

    def __init__(
        self,
        special: Mapping[str, int],
        other: Collection[str] = (),
        whole_words: Collection[int] = (),
    ) -> None:
        self._whole_words = frozenset(whole_words)
        self.special = {text: token_id for text, token_id in special.items() if text}
        self._pattern = _any_of([*self.special, *other]) if self.special else None

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, end, token id) of every control token spelled in `text`, in order."""
        if self._pattern is None:
            return
        for match in self._pattern.finditer(text):
            token_id = self.special.get(match.group())
            if token_id is None:
                continue
            start, end = match.span()
            touched = _WORD.match(text[end : end + 1]) or _WORD.match(
                text[max(start - 1, 0) : start]
            )
            if not (touched and token_id in self._whole_words):
                yield start, end, token_id

    def split(self, text: str) -> list[str | int]:
        """The text as runs of plain text and ids of control tokens; no run is empty."""
        runs: list[str | int] = []
        done = 0
        for start, end, token_id in self.find(text):
            if start > done:
                runs.append(text[done:start])
            runs.append(token_id)
            done = end
        if done < len(text):
            runs.append(text[done:])
        return runs


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern that takes the longest word at a place in time independent of their number."""
    trie: Trie = {}
    for word in words:
        if not word:
            continue
        node = trie
        for char in word:
            node = node.setdefault(char, {})
        node[_END] = {}
    try:
        return re.compile(_pattern(trie))
    except RecursionError as error:
        raise TokenizerError("the special tokens nest too deeply to be matched") from error


def _pattern(node: Trie) -> str:
    branches = [re.escape(char) + _tail(child) for char, child in node.items() if char != _END]
    if not branches:
        return ""
    body = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    if _END not in node:
        return body
    return f"(?:{body})?"  # greedy: the longer word first


def _tail(node: Trie) -> str:
    """`_pattern(node)`, walking an unbranched chain without recursion."""
    chain = ""
    while len(node) == 1 and _END not in node:
        [(char, node)] = node.items()
        chain += re.escape(char)
    return chain + _pattern(node)
