"""DRY ("don't repeat yourself"): which tokens would prolong a repetition, and how long it is.

Source: github.com/oobabooga/text-generation-webui, pull request 5677. Matches end at sequence
breakers, which are never penalized themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Repetitions:
    """The last tokens, and for each of them how far the text before it matches the text's end.

    Every token that is appended updates all matches at once: a match grows where the same token
    stands, and ends everywhere else. Arrays are replaced, not changed, so that copies share them.
    """

    def __init__(self, tokens: Sequence[int], breakers: frozenset[int], reach: int) -> None:
        """`reach`: how many of the last tokens count; -1: all."""
        self._breakers = breakers
        self._reach = reach
        start = max(0, len(tokens) - reach) if reach > 0 else 0
        # A breaker becomes a negative number of its own, which equals nothing.
        self._tokens = np.array(
            [-1 - i if t in breakers else t for i, t in enumerate(tokens[start:])], dtype=np.int64
        )
        self._matches = _matches(self._tokens)

    def copy(self) -> Repetitions:
        other = Repetitions.__new__(Repetitions)
        other.__dict__.update(self.__dict__)
        return other

    def append(self, token: int) -> None:
        tokens, matches = self._tokens, self._matches
        if self._reach > 0 and len(tokens) >= self._reach:
            tokens, matches = tokens[1:], matches[1:]
        grown = np.zeros(len(tokens) + 1, dtype=np.int64)
        new = token
        if token in self._breakers:
            new = min(0, int(tokens.min(initial=0))) - 1  # equal to no other
        else:
            same = np.flatnonzero(tokens == token)
            before = np.where(same > 0, matches[same - 1], 0)
            # What lies outside the window ends a match.
            grown[same] = np.minimum(before, same) + 1
        self._tokens = np.append(tokens, new)
        self._matches = grown

    def prolonging(self, shortest: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids that would prolong a repetition of at least `shortest` tokens, and the length
        of the longest such repetition for each."""
        matches = self._matches[:-1]
        places = np.flatnonzero(matches >= shortest)
        nexts, lengths = self._tokens[places + 1], matches[places]
        real = nexts >= 0
        ids, where = np.unique(nexts[real], return_inverse=True)
        longest = np.zeros(len(ids), dtype=np.int64)
        np.maximum.at(longest, where, lengths[real])
        return ids, longest


def _matches(tokens: np.ndarray) -> np.ndarray:
    """For every place, the length of the longest common end of tokens[: place + 1] and tokens.

    The Z algorithm on the reversed text, in linear time. The last place gets 0.
    """
    text = tokens[::-1].tolist()
    size = len(text)
    z = [0] * size
    left = right = 0
    for i in range(1, size):
        length = min(right - i, z[i - left]) if i < right else 0
        while i + length < size and text[length] == text[i + length]:
            length += 1
        if i + length > right:
            left, right = i, i + length
        z[i] = length
    return np.array(z[::-1], dtype=np.int64)
