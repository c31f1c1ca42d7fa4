"""Tokenizers from the vocabulary inside a GGUF file.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from localllm.errors import TokenizerError, UnsupportedModel
from localllm.tokenizer.base import Tokenizer
from localllm.tokenizer.codec import Codec
from localllm.tokenizer.endings import end_ids, is_marker
from localllm.tokenizer.fast import FastCodec
from localllm.tokenizer.pretokenizers import kind_named
from localllm.tokenizer.sentence import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentenceCodec,
    build_proto,
)

_LOOKS_CONTROL = re.compile(r"<\|.+\|>|<｜.+｜>")  # noqa: RUF001
_KEY = "tokenizer.ggml."
NAMED_IDS = {  # GGUF key -> the template's name for the token
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
    "seperator_token_id": "sep_token",  # spelled so in the format
    "mask_token_id": "mask_token",
}


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer a GGUF file's metadata describes, or None where it holds no vocabulary.

    Raises `UnsupportedModel` for kinds we do not run, `TokenizerError` for damaged ones.
    """
    model = metadata.get(_KEY + "model")
    if model is None or model in ("none", "no_vocab"):
        return None
    vocabulary = GGUFVocabulary(metadata)
    codec: Codec
    if model == "gpt2":
        kind = kind_named(metadata.get(_KEY + "pre"))
        codec = _byte_pairs(vocabulary, metadata)
        add_bos = kind.add_bos
    elif model == "llama":
        codec = _sentence_pieces(vocabulary, metadata)
        add_bos = True
    elif model == "gemma4":
        codec = _spelled_pairs(vocabulary, metadata)
        add_bos = True
    else:
        raise UnsupportedModel(
            f"the file's vocabulary is of the kind {model!r}",
            hint="localllm runs 'gpt2' (byte-level BPE), 'llama' (SentencePiece) and 'gemma4' "
            "vocabularies",
        )
    bos, eos = vocabulary.named("bos_token_id"), vocabulary.named("eos_token_id")
    add_bos = _flag(metadata, "add_bos_token", add_bos)
    add_eos = _flag(metadata, "add_eos_token", False)
    if (add_bos and bos is None) or (add_eos and eos is None):
        which = "bos" if add_bos and bos is None else "eos"
        raise TokenizerError(f"add_{which}_token is set but {which}_token_id is missing")
    ends = [vocabulary.named(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    return Tokenizer(
        codec,
        bos_id=bos,
        eos_ids=end_ids(codec.special, [id_ for id_ in ends if id_ is not None]),
        prefix=(bos,) if add_bos and bos is not None else (),
        suffix=(eos,) if add_eos and eos is not None else (),
        templates=templates_of(metadata),
        variables={
            name: vocabulary.tokens[id_]
            for key, name in NAMED_IDS.items()
            if (id_ := vocabulary.named(key)) is not None
        },
    )


class GGUFVocabulary:
    """Tokens, types and named ids, checked."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        tokens = metadata.get(_KEY + "tokens")
        if not isinstance(tokens, list | tuple) or not tokens or not isinstance(tokens[0], str):
            raise TokenizerError("tokenizer.ggml.tokens is missing or holds no text")
        self.tokens: list[str] = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        self.types: list[int] = self._column("token_type", NORMAL, int)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        # Files of Gemma 4 have a few twice, of which llama.cpp takes the later.
        if len(self.ids) != len(self.tokens) and metadata.get(_KEY + "model") != "gemma4":
            twice = next(t for i, t in enumerate(self.tokens) if self.ids[t] != i)
            raise TokenizerError(f"the vocabulary holds the token {twice!r} twice")
        self._repair_types()

    def scores(self) -> list[float]:
        return self._column("scores", 0.0, float)

    def named(self, key: str) -> int | None:
        """The id under a key of the metadata; None if absent or marked as such."""
        value = self._metadata.get(_KEY + key)
        if value is None or value in (-1, 0xFFFFFFFF):
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise TokenizerError(
                f"tokenizer.ggml.{key} is {value!r}, outside the vocabulary of {len(self.tokens)}"
            )
        return value

    def of_type(self, *kinds: int) -> dict[str, int]:
        wanted = set(kinds)
        return {self.tokens[i]: i for i, kind in enumerate(self.types) if kind in wanted}

    def _repair_types(self) -> None:
        """Files exist whose control tokens are typed as plain or user-defined text.

        What a key names as an end or a beginning, and what looks like "<|this|>" or is a known
        end mark, is a control token; converters have come to the same rule.
        """
        for key in ("eos_token_id", "bos_token_id", "eot_token_id", "eom_token_id"):
            token_id = self.named(key)
            if token_id is not None and self.types[token_id] == NORMAL:
                self.types[token_id] = CONTROL
        for i, kind in enumerate(self.types):
            if (kind == USER_DEFINED and _LOOKS_CONTROL.fullmatch(self.tokens[i])) or (
                kind == NORMAL and is_marker(self.tokens[i])
            ):
                self.types[i] = CONTROL

    def _column(self, key: str, default: Any, kind: type) -> list[Any]:
        values = self._metadata.get(_KEY + key)
        if values is None:
            return [default] * len(self.tokens)
        if len(values) < len(self.tokens):
            raise TokenizerError(
                f"tokenizer.ggml.{key} has {len(values)} entries for {len(self.tokens)} tokens"
            )
        try:
            return [kind(value) for value in values[: len(self.tokens)]]
        except (TypeError, ValueError) as error:
            raise TokenizerError(f"tokenizer.ggml.{key} holds no numbers: {error}") from error


def merges_of(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of a byte-level vocabulary. Raises TokenizerError for a line that is none."""
    lines = metadata.get(_KEY + "merges")
    if lines is None:
        raise TokenizerError("tokenizer.ggml.merges is missing")
    merges = []
    for number, line in enumerate(lines):
        cut = line.find(" ", 1)
        if cut < 0:
            raise TokenizerError(f"tokenizer.ggml.merges[{number}] is no pair: {line!r}")
        merges.append((line[:cut], line[cut + 1 :]))
    return merges


def _byte_pairs(vocabulary: GGUFVocabulary, metadata: Mapping[str, Any]) -> FastCodec:
    kind = kind_named(metadata.get(_KEY + "pre"))
    inner = _merging(vocabulary, metadata, ignore_merges=kind.ignore_merges)
    normalizer = kind.normalizer()
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.pre_tokenizer = kind.pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    return FastCodec(inner, vocabulary.of_type(CONTROL, UNKNOWN), vocabulary.tokens)


def _spelled_pairs(vocabulary: GGUFVocabulary, metadata: Mapping[str, Any]) -> FastCodec:
    """Gemma 4's: pairs of characters as they are, spaces written "▁", and bytes for the rest."""
    inner = _merging(vocabulary, metadata, byte_fallback=True)
    inner.normalizer = normalizers.Replace(" ", SPACE)
    # No token reaches across the end of a line, save those of ends of lines alone.
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[^\n]+|\n+"), "isolated")
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return FastCodec(inner, vocabulary.of_type(CONTROL, UNKNOWN), vocabulary.tokens)


def _merging(
    vocabulary: GGUFVocabulary, metadata: Mapping[str, Any], **options: bool
) -> tokenizers.Tokenizer:
    merges = merges_of(metadata)
    control = vocabulary.of_type(CONTROL, UNKNOWN)
    # Under a name that no text is spelled by, no text can become a control token.
    ids = {f"\ue000{i}" if token in control else token: i for token, i in vocabulary.ids.items()}
    try:
        model = models.BPE(vocab=ids, merges=merges, **options)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"the vocabulary and its merges do not fit: {error}") from error
    inner = tokenizers.Tokenizer(model)
    inner.add_tokens(
        [AddedToken(token, normalized=False) for token in vocabulary.of_type(USER_DEFINED)]
    )
    return inner


def _sentence_pieces(vocabulary: GGUFVocabulary, metadata: Mapping[str, Any]) -> SentenceCodec:
    types, tokens = list(vocabulary.types), list(vocabulary.tokens)
    unknown = vocabulary.named("unknown_token_id") or 0
    for i, kind in enumerate(types):
        if kind == UNKNOWN and i != unknown:
            types[i] = CONTROL  # the library takes exactly one
        elif not NORMAL <= kind <= BYTE:
            types[i] = UNUSED
    types[unknown] = UNKNOWN
    added: dict[str, int] = {}
    for i, kind in enumerate(types):
        if kind == USER_DEFINED:
            # Files hold these with plain spaces; the library looks for them in escaped text.
            piece = tokens[i].replace(" ", SPACE)
            if piece != tokens[i] and piece in vocabulary.ids:
                added[tokens[i]] = i  # a token of its own beside the piece of the same look
                types[i] = UNUSED
            else:
                tokens[i] = piece
    proto = build_proto(
        zip(tokens, vocabulary.scores(), types, strict=True),
        byte_fallback=types.count(BYTE) == 256,
    )
    spaced = _flag(metadata, "add_space_prefix", True)
    special = {
        vocabulary.tokens[i]: i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)
    }
    return SentenceCodec(
        proto,
        special,
        prefix="each" if spaced else "none",
        added=added,
        strips_after=_phi3_strips(special) if _is_phi3(metadata) else (),
    )


def _is_phi3(metadata: Mapping[str, Any]) -> bool:
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _phi3_strips(special: Mapping[str, int]) -> list[int]:
    """Phi-3's control tokens swallow the white space after them; the format has no key for it."""
    kept = ("<unk>", "<s>", "<|endoftext|>")
    return [token_id for text, token_id in special.items() if text not in kept]


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    return bool(metadata.get(_KEY + key, default))


def templates_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """`tokenizer.chat_template` is "default"; `tokenizer.chat_template.NAME` are the named ones."""
    root = "tokenizer.chat_template"
    found = {"default": metadata.get(root)}
    for key, value in metadata.items():
        if key.startswith(root + "."):
            found[key.removeprefix(root + ".")] = value
    return {name: text for name, text in found.items() if isinstance(text, str) and text}
