"""The vocabulary of a GGUF file as the files that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from localllm.errors import TokenizerError, UnsupportedModel
from localllm.tokenizer.gguf import NAMED_IDS, GGUFVocabulary, merges_of, templates_of
from localllm.tokenizer.pretokenizers import kind_named
from localllm.tokenizer.sentence import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED

_KEY = "tokenizer.ggml."


def hub_tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja, as text.

    Nothing for a file without a vocabulary. Raises UnsupportedModel for a kind that is not run.
    """
    model = metadata.get(_KEY + "model")
    if model is None or model in ("none", "no_vocab"):
        return {}
    vocabulary = GGUFVocabulary(metadata)
    if model == "gpt2":
        kind = kind_named(metadata.get(_KEY + "pre"))
        inner, add_bos = _byte_pairs(vocabulary, metadata), kind.add_bos
    elif model == "llama":
        inner, add_bos = _sentence_pieces(vocabulary, metadata), True
    else:
        raise UnsupportedModel(f"a vocabulary of the kind {model!r} cannot be written")
    inner.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in vocabulary.of_type(CONTROL, UNKNOWN)
        ]
    )
    bos, eos = vocabulary.named("bos_token_id"), vocabulary.named("eos_token_id")
    frames = {
        "bos": bool(metadata.get(_KEY + "add_bos_token", add_bos)) and bos is not None,
        "eos": bool(metadata.get(_KEY + "add_eos_token", False)) and eos is not None,
    }
    if any(frames.values()):
        inner.post_processor = _frame(vocabulary, bos, eos, frames)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": frames["bos"],
        "add_eos_token": frames["eos"],
    }
    for key, name in NAMED_IDS.items():
        token_id = vocabulary.named(key)
        if token_id is not None:
            settings[name] = vocabulary.tokens[token_id]
    files = {"tokenizer.json": inner.to_str(pretty=True)}
    templates = templates_of(metadata)
    if templates:
        default = templates.pop("default", None)
        if default is not None:
            files["chat_template.jinja"] = default
        for name, text in templates.items():
            if not name.replace("_", "").replace("-", "").isalnum():
                raise TokenizerError(f"a chat template has the name {name!r}, which is no name")
            files[f"additional_chat_templates/{name}.jinja"] = text
    files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return files


def _byte_pairs(vocabulary: GGUFVocabulary, metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    kind = kind_named(metadata.get(_KEY + "pre"))
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids, merges=merges_of(metadata), ignore_merges=kind.ignore_merges
        )
    )
    normalizer = kind.normalizer()
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.pre_tokenizer = kind.pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens(
        [AddedToken(token, normalized=False) for token in vocabulary.of_type(USER_DEFINED)]
    )
    return inner


def _sentence_pieces(
    vocabulary: GGUFVocabulary, metadata: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: of two neighbours those merge first whose union has the best score."""
    if vocabulary.types.count(BYTE) != 256:
        raise UnsupportedModel("a SentencePiece vocabulary without bytes cannot be written")
    unknown = vocabulary.tokens[vocabulary.named("unknown_token_id") or 0]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges(vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaced = bool(metadata.get(_KEY + "add_space_prefix", True))
    as_space = normalizers.Replace(" ", SPACE)
    inner.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), as_space]) if spaced else as_space
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spaced else steps)
    inner.add_tokens(
        [AddedToken(token, normalized=False) for token in vocabulary.of_type(USER_DEFINED)]
    )
    return inner


def _merges(vocabulary: GGUFVocabulary) -> list[tuple[str, str]]:
    scores, types, ids = vocabulary.scores(), vocabulary.types, vocabulary.ids
    found: list[tuple[float, int, str, str]] = []
    for token_id, token in enumerate(vocabulary.tokens):
        if types[token_id] != NORMAL or len(token) < 2:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            at, then = ids.get(left), ids.get(right)
            if at is None or then is None or types[at] != NORMAL or types[then] != NORMAL:
                continue
            found.append((-scores[token_id], token_id, left, right))
    found.sort()
    return [(left, right) for _, _, left, right in found]


def _frame(
    vocabulary: GGUFVocabulary, bos: int | None, eos: int | None, frames: Mapping[str, bool]
) -> processors.PostProcessor:
    before, after, special = "", "", []
    if frames["bos"] and bos is not None:
        before = f"{vocabulary.tokens[bos]} "
        special.append((vocabulary.tokens[bos], bos))
    if frames["eos"] and eos is not None:
        after = f" {vocabulary.tokens[eos]}"
        special.append((vocabulary.tokens[eos], eos))
    return processors.TemplateProcessing(
        single=f"{before}$A{after}",
        pair=f"{before}$A{after} {before}$B:1{after}",
        special_tokens=special,
    )
