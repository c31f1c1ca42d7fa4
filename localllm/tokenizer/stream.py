"""Detokenize one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Turns ids into text as they come, never half a character, at O(1) a token.

    The pushed texts and `finish()` joined are exactly `Tokenizer.decode` of the same ids: bytes
    that are no UTF-8 become U+FFFD, once it is sure that no later byte completes them.
    """

    def __init__(self, piece: Callable[[int], bytes], *, strips_space: bool) -> None:
        self._piece = piece
        self._strip_next = strips_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain after this token; may be empty."""
        data = self._piece(token_id)
        if self._strip_next and data:
            self._strip_next = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What was held back: U+FFFD when the ids end inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)
