"""The vocabulary of a folder as GGUF metadata: the way back from `gguf.py`.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer", and
https://huggingface.co/docs/tokenizers for tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from localllm.errors import TokenizerError, UnsupportedModel
from localllm.tokenizer.base import Tokenizer
from localllm.tokenizer.bytelevel import byte_token
from localllm.tokenizer.gguf import NAMED_IDS
from localllm.tokenizer.hf import tokenizer_from_folder
from localllm.tokenizer.pretokenizers import GPT2_PATTERN, KINDS
from localllm.tokenizer.sentence import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    load_model,
)

_KEY = "tokenizer.ggml."
_MAX_BYTES = 256 << 20


def gguf_vocabulary(folder: Path, size: int) -> dict[str, Any]:
    """Metadata of tokens, merges or scores, special ids and chat templates; of a folder without a
    tokenizer, that there is none. size: of the embedding, which tokens without a name fill up.

    Raises UnsupportedModel for a tokenizer that llama.cpp has no kind for.
    """
    tokenizer = tokenizer_from_folder(folder)
    if tokenizer is None:
        return {_KEY + "model": "no_vocab"}
    if (folder / "tokenizer.json").exists():
        found = _from_json(folder / "tokenizer.json", size)
    else:
        found = _from_sentence_pieces(folder / "tokenizer.model", size)
    return {**found, **_special(tokenizer, found[_KEY + "tokens"])}


def _special(tokenizer: Tokenizer, tokens: list[str]) -> dict[str, Any]:
    ids = {token: i for i, token in enumerate(tokens)}
    types: dict[str, Any] = {
        _KEY + "add_bos_token": bool(tokenizer.frame[0]),
        _KEY + "add_eos_token": bool(tokenizer.frame[1]),
    }
    for key, name in NAMED_IDS.items():
        text = tokenizer.special_names.get(name)
        if isinstance(text, str) and text in ids:
            types[_KEY + key] = ids[text]
    for name, text in tokenizer.chat_templates.items():
        root = "tokenizer.chat_template"
        types[root if name == "default" else f"{root}.{name}"] = text
    return types


def _from_json(path: Path, size: int) -> dict[str, Any]:
    if path.stat().st_size > _MAX_BYTES:
        raise TokenizerError(f"{path}: more than {_MAX_BYTES >> 20} MiB")
    tree = json.loads(path.read_text("utf-8"))
    model = tree["model"]
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedModel(f"{path}: {model['type']} vocabularies are not written as GGUF")
    tokens, kinds = _tokens(tree, size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    found = {_KEY + "tokens": tokens, _KEY + "token_type": kinds}
    steps = [*_flat(tree.get("pre_tokenizer"), "pretokenizers")]
    if any(
        step["type"] == "ByteLevel" for step in [*steps, *_flat(tree.get("decoder"), "decoders")]
    ):
        kind = _kind(path, tree, steps, bool(model.get("ignore_merges")))
        return {**found, _KEY + "model": "gpt2", _KEY + "pre": kind, _KEY + "merges": merges}
    if not model.get("byte_fallback"):
        raise UnsupportedModel(f"{path}: a vocabulary of neither bytes nor SentencePiece")
    scores = [0.0] * len(tokens)
    ids = {token: i for i, token in enumerate(tokens)}
    best: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        best.setdefault(merge.replace(" ", ""), rank)
    for token, rank in best.items():  # what merges first has the best score
        if token in ids:
            scores[ids[token]] = -float(rank + 1)
    for token, token_id in ids.items():
        if kinds[token_id] == NORMAL and byte_token(token) is not None:
            kinds[token_id] = BYTE
    unknown = model.get("unk_token")
    if unknown in ids:
        kinds[ids[unknown]] = UNKNOWN
    return {
        **found,
        _KEY + "model": "llama",
        _KEY + "pre": "default",
        _KEY + "scores": scores,
        _KEY + "add_space_prefix": _adds_space(tree),
    }


def _tokens(tree: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and types by id."""
    names = {token_id: text for text, token_id in tree["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, NORMAL)
    for token in tree.get("added_tokens", ()):
        names[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    count = max(size, 1 + max(names, default=-1))
    if count > size:
        raise TokenizerError(f"the tokenizer has {count} tokens, the model's embedding {size}")
    tokens = [names.get(i, f"[PAD{i}]") for i in range(count)]
    return tokens, [kinds.get(i, UNUSED) for i in range(count)]


def _flat(step: Any, inner: str) -> Iterator[dict[str, Any]]:
    if not step:
        return
    if step["type"] == "Sequence":
        for part in step[inner]:
            yield from _flat(part, inner)
    else:
        yield step


def _kind(path: Path, tree: Mapping[str, Any], steps: list[dict[str, Any]], whole: bool) -> str:
    """The name of what cuts text in this way."""
    patterns = tuple(_patterns(path, steps))
    normalizers = [step["type"] for step in _flat(tree.get("normalizer"), "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise UnsupportedModel(f"{path}: normalizes text by {', '.join(normalizers)}")
    for name, kind in KINDS.items():
        if (kind.patterns, kind.nfc, kind.ignore_merges) == (patterns, bool(normalizers), whole):
            return name
    raise UnsupportedModel(
        f"{path}: cuts text in a way that llama.cpp has no name for",
        hint="a guess would give wrong tokens",
    )


def _patterns(path: Path, steps: list[dict[str, Any]]) -> Iterator[str]:
    for step in steps:
        kind = step["type"]
        if kind == "Split" and "Regex" in step["pattern"]:
            isolated = step["behavior"] == "Isolated"
            if not isolated and not (step["behavior"] == "Removed" and step.get("invert")):
                raise UnsupportedModel(f"{path}: splits text by {step['behavior']!r}")
            yield step["pattern"]["Regex"]
        elif kind == "Digits" and step.get("individual_digits"):
            yield r"\p{N}"
        elif kind == "ByteLevel":
            if step.get("add_prefix_space"):
                raise UnsupportedModel(f"{path}: puts a space before every text")
            if step.get("use_regex", True):
                yield GPT2_PATTERN
        else:
            raise UnsupportedModel(f"{path}: cuts text by {kind!r}")


def _adds_space(tree: Mapping[str, Any]) -> bool:
    steps = [*_flat(tree.get("normalizer"), "normalizers")]
    steps += _flat(tree.get("pre_tokenizer"), "pretokenizers")
    for step in steps:
        if step["type"] == "Prepend" and step.get("prepend") == SPACE:
            return True
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def _from_sentence_pieces(path: Path, size: int) -> dict[str, Any]:
    model = load_model(path.read_bytes())
    count = model.get_piece_size()
    if count > size:
        raise TokenizerError(f"{path}: {count} pieces, and the model's embedding has {size}")
    kinds = []
    for i in range(count):
        checks = (
            (model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_byte, BYTE),
            (model.is_unused, UNUSED),
        )  # fmt: skip
        kinds.append(next((kind for check, kind in checks if check(i)), NORMAL))
    pad = range(count, size)
    spaced = bool(model.encode("a", out_type=str)[0].startswith(SPACE))
    return {
        _KEY + "model": "llama",
        _KEY + "pre": "default",
        _KEY + "tokens": [
            *(str(model.id_to_piece(i)) for i in range(count)),
            *(f"[PAD{i}]" for i in pad),
        ],
        _KEY + "scores": [*(float(model.get_score(i)) for i in range(count)), *(0.0 for _ in pad)],
        _KEY + "token_type": [*kinds, *(UNUSED for _ in pad)],
        _KEY + "add_space_prefix": spaced,
    }
