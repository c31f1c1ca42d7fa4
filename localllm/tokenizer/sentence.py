"""SentencePiece vocabularies, run by the `sentencepiece` library."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from localllm.errors import TokenizerError
from localllm.tokenizer.bytelevel import byte_token
from localllm.tokenizer.matching import SpecialMatcher

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto piece types
SPACE = "▁"

Prefix = Literal["none", "first", "each", "own"]


class SentenceCodec:
    """A SentencePiece model and tokens that were added to it.

    special: control tokens (text -> id); None takes those of the model.
    prefix: where a space is put before the text: nowhere, before a run that begins the text,
        before each run between control tokens, or where the model's own settings say.
    added: further tokens (text -> id) that are matched whole in any text.
    strips_before, strips_after: control tokens that swallow white space beside them.
    """

    def __init__(
        self,
        proto: bytes,
        special: Mapping[str, int] | None = None,
        *,
        prefix: Prefix,
        added: Mapping[str, int] | None = None,
        strips_before: Collection[int] = (),
        strips_after: Collection[int] = (),
    ) -> None:
        self._model = load_model(proto if prefix == "own" else without_prefix(proto))
        if special is None:
            special = control_pieces(self._model)
        self._prefix = prefix
        self.special = dict(special)
        self.added = dict(added or {})
        self.whole_words: Collection[int] = ()
        self._strips_before, self._strips_after = set(strips_before), set(strips_after)
        self._find_added = SpecialMatcher(self.added)
        self._extra = {id_: text for text, id_ in [*self.added.items(), *self.special.items()]}
        self._pieces = self._model.get_piece_size()
        self.size = max([self._pieces, *(id_ + 1 for id_ in self._extra)])
        self.strips_space = prefix != "none"

    def encode(self, runs: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        cut = [*self._cut_at_added(runs)]
        for index, run in enumerate(cut):
            if isinstance(run, int):
                ids.append(run)
                continue
            if index and cut[index - 1] in self._strips_after:
                run = run.lstrip()
            if index + 1 < len(cut) and cut[index + 1] in self._strips_before:
                run = run.rstrip()
            if not run:
                continue
            spaced = self._prefix == "each" or (self._prefix == "first" and index == 0)
            ids.extend(self._model.encode(f" {run}" if spaced else run))
        return ids

    def _cut_at_added(self, runs: Sequence[str | int]) -> Iterator[str | int]:
        for run in runs:
            if isinstance(run, int):
                yield run
            else:
                yield from self._find_added.split(run)

    def text(self, token_id: int) -> str:
        if token_id in self._extra:
            return self._extra[token_id]
        if token_id >= self._pieces:
            return ""
        return str(self._model.id_to_piece(token_id))

    def bytes(self, token_id: int) -> bytes:
        if token_id in self._extra:
            return self._extra[token_id].encode()
        text = self.text(token_id)
        if text and self._model.is_byte(token_id):
            byte = byte_token(text)
            assert byte is not None
            return bytes([byte])
        return text.replace(SPACE, " ").encode()


def load_model(proto: bytes) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor  # 2 MB that most models do without

    try:
        return SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, ValueError, OSError) as error:
        raise TokenizerError(f"sentencepiece refuses the vocabulary: {error}") from error


def control_pieces(model: SentencePieceProcessor) -> dict[str, int]:
    """Control and unknown pieces: text -> id."""
    return {
        str(model.id_to_piece(i)): i
        for i in range(model.get_piece_size())
        if model.is_control(i) or model.is_unknown(i)
    }


def without_prefix(proto: bytes) -> bytes:
    """The model with its automatic space before every text turned off.

    A second normalizer message in a serialized proto is merged over the first.
    """
    off = _field(3, 0)
    return proto + b"\x1a" + _varint(len(off)) + off


def build_proto(
    pieces: Iterable[tuple[str, float, int]], *, byte_fallback: bool, bpe: bool = True
) -> bytes:
    """A serialized SentencePiece `ModelProto` of (piece, score, type) in the order of ids.

    Text is taken as it is: no Unicode normalization, no prefix, spaces kept.
    Source: sentencepiece_model.proto of google/sentencepiece.
    """
    size = [_varint(n) for n in range(256)]
    score_of = struct.Struct("<f").pack
    parts = []
    for text, score, kind in pieces:
        raw = text.encode()
        length = size[len(raw)] if len(raw) < 256 else _varint(len(raw))
        body = b"".join((b"\x0a", length, raw, b"\x15", score_of(score), b"\x18", size[kind]))
        length = size[len(body)] if len(body) < 256 else _varint(len(body))
        parts.append(b"\x0a" + length + body)
    trainer = _field(3, 2 if bpe else 1) + _field(35, int(byte_fallback))
    normalizer = _field(3, 0) + _field(4, 0) + _field(5, 1)
    parts.append(b"\x12" + _varint(len(trainer)) + trainer)
    parts.append(b"\x1a" + _varint(len(normalizer)) + normalizer)
    return b"".join(parts)


def _field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
