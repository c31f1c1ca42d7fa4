"""What a vocabulary and its algorithm offer, whatever library runs them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol


class Codec(Protocol):
    """Runs of text to ids, and an id back to its bytes.

    size: one more than the largest id.
    special: control tokens (text -> id); `encode` never finds them in a run of text.
    added: texts that the algorithm matches whole wherever they stand, before anything else.
    whole_words: control tokens that only count where no letter or digit touches them.
    strips_space: the algorithm puts a space before the text, so decoding drops one.
    """

    @property
    def size(self) -> int: ...

    @property
    def special(self) -> Mapping[str, int]: ...

    @property
    def added(self) -> Collection[str]: ...

    @property
    def whole_words(self) -> Collection[int]: ...

    @property
    def strips_space(self) -> bool: ...

    def encode(self, runs: Sequence[str | int]) -> list[int]:
        """Ids of a text cut at its control tokens: each run is plain text, or a special id."""
        ...

    def text(self, token_id: int) -> str:
        """The token as the vocabulary spells it ("▁the", "Ġthe")."""
        ...

    def bytes(self, token_id: int) -> bytes:
        """What the token adds to the text, control tokens as they are spelled."""
        ...
