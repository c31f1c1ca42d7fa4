"""Vocabularies run by the `tokenizers` library."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken

from localllm.errors import UnsupportedModel
from localllm.tokenizer.bytelevel import byte_token, to_bytes


class FastCodec:
    """A `tokenizers.Tokenizer` whose control tokens are out of reach of the text.

    The library is told to take control tokens in the text as plain text. Each one is known to it
    by an alias that no text can spell, so that everything the library does around a control
    token (stripping of spaces, rules for the first piece, normalization by piece) stays its own.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        special: Mapping[str, int],
        texts: Sequence[str] | None = None,
    ) -> None:
        """`texts`: every token in the order of ids; None to ask the library."""
        self._inner = inner
        self.special = dict(special)
        inner.no_truncation()  # some files carry their training's limits
        inner.no_padding()
        known = inner.get_added_tokens_decoder()
        self.added = {token.content for id_, token in known.items() if id_ not in special.values()}
        self._added_ids = set(known)
        self.whole_words = {
            id_ for id_, token in known.items() if token.single_word and id_ in special.values()
        }
        decoder = _spec_of(inner.decoder)
        self._byte_level = _is_byte_level(decoder)
        self._replaces = {} if self._byte_level else _replacements(decoder)
        self.strips_space = _strips_space(decoder)
        self._texts = _texts(inner) if texts is None else texts
        self.size = len(self._texts)
        self._added_ids.update(special.values())
        self._alias, self._real = self._add_aliases()

    def encode(self, runs: Sequence[str | int]) -> list[int]:
        text = "".join(run if isinstance(run, str) else self._alias[run] for run in runs)
        if not text:
            return []
        ids = self._inner.encode(text, add_special_tokens=False).ids
        real = self._real
        return [real.get(token_id, token_id) for token_id in ids]

    def text(self, token_id: int) -> str:
        return self._texts[token_id] if token_id < self.size else ""

    def bytes(self, token_id: int) -> bytes:
        text = self.text(token_id)
        if token_id in self._added_ids:
            return text.encode()
        if self._byte_level:
            return to_bytes(text)
        byte = byte_token(text)
        if byte is not None:
            return bytes([byte])
        for old, new in self._replaces.items():
            text = text.replace(old, new)
        return text.encode()

    def _add_aliases(self) -> tuple[dict[int, str], dict[int, int]]:
        flags = self._inner.get_added_tokens_decoder()
        secret = secrets.token_hex(8)
        # The library numbers new tokens from the count of the old; step over gaps in the ids.
        gaps = self.size - self._inner.get_vocab_size(with_added_tokens=True)
        self._inner.add_tokens([f"\ue000{secret}:gap{i}\ue001" for i in range(gaps)])
        alias: dict[int, str] = {}
        tokens = []
        for text, token_id in self.special.items():
            of = flags.get(token_id) or AddedToken(text)
            alias[token_id] = f"\ue000{secret}:{token_id}\ue001"
            tokens.append(
                AddedToken(
                    alias[token_id],
                    lstrip=of.lstrip,
                    rstrip=of.rstrip,
                    normalized=False,
                )
            )
        self._inner.encode_special_tokens = True
        self._inner.add_tokens(tokens)
        real: dict[int, int] = {}
        for token_id, text in alias.items():
            stand_in = self._inner.token_to_id(text)
            assert stand_in is not None
            assert stand_in >= self.size
            real[stand_in] = token_id
        return alias, real


def _texts(inner: tokenizers.Tokenizer) -> list[str]:
    vocab = inner.get_vocab(with_added_tokens=True)
    texts = [""] * (1 + max(vocab.values(), default=-1))
    for text, token_id in vocab.items():
        texts[token_id] = text
    return texts


def _spec_of(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder as tokenizer.json writes them."""
    if decoder is None:
        return []
    # The binding has no public way to read a decoder's settings but its pickled state.
    spec: dict[str, Any] = json.loads(decoder.__getstate__())
    return list(spec["decoders"]) if spec["type"] == "Sequence" else [spec]


def _is_byte_level(steps: list[dict[str, Any]]) -> bool:
    return any(step["type"] == "ByteLevel" for step in steps)


def _replacements(steps: list[dict[str, Any]]) -> dict[str, str]:
    """What decoding replaces in every token. Raises `UnsupportedModel` for other decoders."""
    replaces: dict[str, str] = {}
    for step in steps:
        kind = step["type"]
        if kind == "Metaspace":
            replaces[step["replacement"]] = " "
        elif kind == "Replace" and "String" in step["pattern"]:
            replaces[step["pattern"]["String"]] = step["content"]
        elif kind == "Strip" and step["content"] == " " and step["stop"] == 0:
            continue
        elif kind not in ("ByteFallback", "Fuse"):
            raise UnsupportedModel(f"the tokenizer's decoder {kind!r} is not one we run")
    return replaces


def _strips_space(steps: list[dict[str, Any]]) -> bool:
    for step in steps:
        if step["type"] == "Strip" and step["start"]:
            return True
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False
