"""Tokenizers from folders as Hugging Face has them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from localllm.errors import TokenizerError, UnsupportedModel
from localllm.tokenizer.base import Tokenizer
from localllm.tokenizer.codec import Codec
from localllm.tokenizer.endings import end_ids
from localllm.tokenizer.fast import FastCodec
from localllm.tokenizer.sentence import (
    SPACE,
    Prefix,
    SentenceCodec,
    control_pieces,
    load_model,
    without_prefix,
)

_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_OTHER_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json", "spiece.model")


def tokenizer_from_folder(
    folder: Path, config: Mapping[str, Any] | None = None
) -> Tokenizer | None:
    """The tokenizer of a folder with tokenizer.json or tokenizer.model; None without any."""
    if config is None:
        config = _read(folder, "config.json")
    settings = _Settings(folder)
    codec: Codec
    if (folder / "tokenizer.json").exists():
        inner = _load(folder / "tokenizer.json")
        prefix, suffix = _framing(inner)
        codec = _fast(inner, settings)
    elif (folder / "tokenizer.model").exists():
        codec = _sentence((folder / "tokenizer.model").read_bytes(), settings)
        prefix, suffix = [], []
        settings.assume_bos(codec)
    else:
        for name in _OTHER_FILES:
            if (folder / name).exists():
                raise UnsupportedModel(
                    f"{folder} has {name}, but neither tokenizer.json nor tokenizer.model",
                    hint="save the tokenizer with transformers once to get tokenizer.json",
                )
        return None
    bos, eos = (_id_of(codec, settings.names.get(name)) for name in ("bos_token", "eos_token"))
    if settings.frames:
        prefix = [bos] if bos is not None and settings.frames.get("bos") else []
        suffix = [eos] if eos is not None and settings.frames.get("eos") else []
    declared = {eos} if eos is not None else set()
    for source in (
        config,
        config.get("text_config") or {},
        _read(folder, "generation_config.json"),
    ):
        declared.update(_ids(source.get("eos_token_id")))
    return Tokenizer(
        codec,
        bos_id=bos,
        eos_ids=end_ids(codec.special, declared),
        prefix=prefix,
        suffix=suffix,
        templates=settings.templates,
        variables=settings.names,
    )


class _Settings:
    """What the files beside the vocabulary say.

    names: special tokens as templates see them ("bos_token" -> text, and the lists of others).
    special: every text that these files call a special token.
    added: (id, token) of tokens that were added to the vocabulary.
    frames: whether "bos" and "eos" go around a text, if the files say so.
    """

    def __init__(self, folder: Path) -> None:
        self.raw = _read(folder, "tokenizer_config.json")
        mapped = _read(folder, "special_tokens_map.json")
        self.names: dict[str, Any] = {}
        self.special: set[str] = set()
        for name in (f"{short}_token" for short in _NAMED):
            text = _text(self.raw.get(name, mapped.get(name)))
            if text is not None:
                self.names[name] = text
                self.special.add(text)
        for name in ("additional_special_tokens", "extra_special_tokens"):
            value = self.raw.get(name, mapped.get(name))
            if isinstance(value, Mapping):  # named ones, such as "image_token"
                texts = {key: text for key, item in value.items() if (text := _text(item))}
                self.names.update(texts)
                self.special.update(texts.values())
            elif isinstance(value, list):
                self.names[name] = [text for item in value if (text := _text(item))]
                self.special.update(self.names[name])
        self.added = list(self._added(folder))
        self.special.update(token.content for _, token in self.added if token.special)
        self.frames = {
            name: bool(self.raw[f"add_{name}_token"])
            for name in ("bos", "eos")
            if self.raw.get(f"add_{name}_token") is not None
        }
        self.templates = _templates(folder, self.raw.get("chat_template"))

    def assume_bos(self, codec: Codec) -> None:
        """SentencePiece models begin a text with <s> and know </s> unless told otherwise."""
        for name, text in (("bos_token", "<s>"), ("eos_token", "</s>")):
            if text in codec.special:
                self.names.setdefault(name, text)
        self.frames.setdefault("bos", True)

    def _added(self, folder: Path) -> Iterator[tuple[int, AddedToken]]:
        decoder = self.raw.get("added_tokens_decoder")
        if isinstance(decoder, Mapping):
            for token_id, item in sorted(decoder.items(), key=lambda pair: int(pair[0])):
                flags = {k: bool(item.get(k)) for k in ("lstrip", "rstrip", "single_word")}
                special = bool(item.get("special"))
                token = AddedToken(
                    item["content"],
                    **flags,
                    normalized=bool(item.get("normalized", not special)),
                    special=special,
                )
                yield int(token_id), token
            return
        for text, token_id in sorted(
            _read(folder, "added_tokens.json").items(), key=lambda pair: int(pair[1])
        ):
            yield token_id, AddedToken(text, normalized=False, special=text in self.special)


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} is not a tokenizer.json we can read: {error}") from error


def _fast(inner: tokenizers.Tokenizer, settings: _Settings) -> FastCodec:
    for token_id, token in settings.added:
        if inner.token_to_id(token.content) is None:
            inner.add_tokens([token])
            if inner.token_to_id(token.content) != token_id:
                raise TokenizerError(
                    f"tokenizer_config.json gives {token.content!r} the id {token_id}, "
                    f"but tokenizer.json goes on at {inner.token_to_id(token.content)}"
                )
    known = {
        token.content: id_
        for id_, token in inner.get_added_tokens_decoder().items()
        if token.special
    }
    for text in settings.special:
        known_id = inner.token_to_id(text)
        if known_id is not None and text not in known:
            known[text] = known_id
            inner.add_special_tokens([AddedToken(text, normalized=False, special=True)])
    return FastCodec(inner, known)


def _framing(inner: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text."""
    if inner.post_processor is None:
        return [], []
    # The binding has no public way to read the settings but the pickled state.
    state: dict[str, Any] = json.loads(inner.post_processor.__getstate__())
    before: list[int] = []
    after: list[int] = []
    for step in state.get("processors", [state]):
        if step["type"] == "TemplateProcessing":
            side = before
            for part in step["single"]:
                if "SpecialToken" in part:
                    side.extend(step["special_tokens"][part["SpecialToken"]["id"]]["ids"])
                else:
                    side = after
        elif step["type"] in ("BertProcessing", "RobertaProcessing"):
            before.append(step["cls"][1])
            after.append(step["sep"][1])
    return before, after


def _sentence(proto: bytes, settings: _Settings) -> SentenceCodec:
    model = load_model(proto)
    special = control_pieces(model)
    added: dict[str, int] = {}
    before, after = (
        [id_ for id_, token in settings.added if getattr(token, side)]
        for side in ("lstrip", "rstrip")
    )
    for token_id, token in settings.added:
        if token.special:
            special[token.content] = token_id
        elif token_id >= model.get_piece_size():
            added[token.content] = token_id
    for text in settings.special:
        token_id = model.piece_to_id(text)
        if token_id != model.unk_id():
            special.setdefault(text, token_id)
    return SentenceCodec(
        proto,
        special,
        prefix=_prefix(proto, settings),
        added=added,
        strips_before=before,
        strips_after=after,
    )


def _prefix(proto: bytes, settings: _Settings) -> Prefix:
    if not load_model(proto).encode("a", out_type=str)[0].startswith(SPACE):
        return "none"
    if not load_model(without_prefix(proto)).encode(" a", out_type=str)[0].startswith(SPACE):
        return "own"  # it drops spaces at the start, so one cannot be put there from outside
    return "first" if settings.raw.get("legacy") is False else "each"


def _templates(folder: Path, configured: Any) -> dict[str, str]:
    """Templates by name; files beside the configuration win over it, as in transformers."""
    found: dict[str, str] = {}
    if isinstance(configured, str):
        found["default"] = configured
    elif isinstance(configured, list):
        found.update({item["name"]: item["template"] for item in configured})
    elif isinstance(configured, Mapping):
        found.update(configured)
    old = _read(folder, "chat_template.json").get("chat_template")
    if isinstance(old, str):
        found["default"] = old
    for path in (folder / "additional_chat_templates").glob("*.jinja"):
        found[path.stem] = path.read_text(encoding="utf-8")
    single = folder / "chat_template.jinja"
    if single.exists():
        found["default"] = single.read_text(encoding="utf-8")
    return found


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return value


def _text(value: Any) -> str | None:
    """A token written as text, or as an object with a `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _id_of(codec: Codec, text: str | None) -> int | None:
    return None if text is None else codec.special.get(text)


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
