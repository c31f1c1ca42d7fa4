"""What a benchmark may ask of an engine. Both sides answer the same questions in the same units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

PREFILL_CHUNK = 512  # rows a step when a context is filled


class Side(Protocol):
    """Each call answers the seconds of every step it timed."""

    def prefill(self, count: int) -> list[float]:
        """A prompt of `count` tokens from an empty cache, the last row's logits taken: one step."""
        ...

    def decode(self, context: int, count: int) -> list[float]:
        """`count` steps of one token each, the first at position `context`."""
        ...

    def batch(self, sequences: int, context: int, count: int) -> list[float]:
        """`count` steps, each decoding one token in so many sequences of `context` positions."""
        ...

    def verify(self, drafts: int, context: int, count: int) -> list[float]:
        """`count` steps over `drafts` + 1 rows of one sequence, all with logits."""
        ...

    def pause(self) -> None:
        """Leaves the processor to the other side."""
        ...

    def close(self) -> None: ...


def token_ids(start: int, count: int) -> Iterable[int]:
    """The same ids for both sides: spread over the vocabulary, none of them special."""
    return [1000 + at * 7919 % 40000 for at in range(start, start + count)]
