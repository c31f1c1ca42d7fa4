"""Vocabularies inside GGUF: flags, token types, and files that are damaged or of other kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localllm.errors import TokenizerError, UnsupportedModel
from localllm.tokenizer import Tokenizer
from localllm.tokenizer.bytelevel import BYTE_OF
from localllm.tokenizer.gguf import tokenizer_from_metadata
from localllm.tokenizer.hf import tokenizer_from_folder

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def byte_pairs(**changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary: the bytes, some merges, two control and two user-defined tokens."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
    tokens = [*BYTE_OF, *(m.replace(" ", "") for m in merges), "<s>", "</s>", "<tool>", "\n\n"]
    types = [NORMAL] * (len(tokens) - 4) + [CONTROL, CONTROL, USER_DEFINED, USER_DEFINED]
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
    }
    keys.update(changes)
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def pieces(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary with byte fallback."""
    rows = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    rows += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    words = ["▁hello", "▁wo", "hello", "hell", "▁", "he", "ll", "o", "w", "h", "e", "l", "▁▁"]
    rows += [(word, -float(i), NORMAL) for i, word in enumerate(words)]
    rows += [("<tool>", 0.0, USER_DEFINED), ("    ", 0.0, USER_DEFINED)]
    keys: dict[str, Any] = {
        "model": "llama",
        "tokens": [row[0] for row in rows],
        "scores": [row[1] for row in rows],
        "token_type": [row[2] for row in rows],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    keys.update(changes)
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def spelled_pairs(**changes: Any) -> dict[str, Any]:
    """As Gemma 4 has it: merges of characters, bytes for those that are missing."""
    merges = ["h e", "l l", "he ll", "hell o", "▁ w", "\n \n"]
    rows = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    rows += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    rows += [(text, NORMAL) for text in "helow▁\n12<tos/>"]
    rows += [(merge.replace(" ", ""), NORMAL) for merge in merges]
    rows += [("<tool>", USER_DEFINED)]
    keys: dict[str, Any] = {
        "model": "gemma4",
        "tokens": [row[0] for row in rows],
        "token_type": [row[1] for row in rows],
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    keys.update(changes)
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def load(metadata: dict[str, Any]) -> Tokenizer:
    tokenizer = tokenizer_from_metadata(metadata)
    assert tokenizer is not None
    return tokenizer


def texts(tokenizer: Tokenizer, text: str, **options: Any) -> list[str]:
    ids = tokenizer.encode(text, **{"add_special": False, **options})
    return [tokenizer.token_text(i) for i in ids]


def test_merges_are_applied_in_their_order() -> None:
    assert texts(load(byte_pairs()), "hello world12") == ["hello", "Ġw", *"orld", "12"]


def test_a_kind_cuts_the_text_before_merging() -> None:
    assert texts(load(byte_pairs(pre="smollm")), "12") == ["1", "2"]


def test_a_whole_piece_is_taken_whatever_the_merges_say_where_the_kind_says_so() -> None:
    changes = {"merges": ["l l"], "add_bos_token": False}
    assert texts(load(byte_pairs(pre="llama-bpe", **changes)), "hello") == ["hello"]
    assert texts(load(byte_pairs(pre="gpt-2", **changes)), "hello") == ["h", "e", "ll", "o"]


@pytest.mark.parametrize("make", [byte_pairs, pieces, spelled_pairs])
def test_user_defined_tokens_are_matched_whole_and_control_tokens_only_on_request(
    make: Any,
) -> None:
    tokenizer = load(make())
    assert "<tool>" in texts(tokenizer, "o<tool>o")
    assert "<s>" not in texts(tokenizer, "o<s>o")
    assert "<s>" in texts(tokenizer, "o<s>o", parse_special=True)
    assert tokenizer.special_ids >= {tokenizer.bos_id, *tokenizer.eos_ids}


@pytest.mark.parametrize("make", [byte_pairs, pieces, spelled_pairs])
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
def test_add_bos_and_add_eos_are_obeyed(make: Any, bos: bool | None, eos: bool | None) -> None:
    tokenizer = load(make(add_bos_token=bos, add_eos_token=eos))
    expect_bos = bos if bos is not None else make is not byte_pairs
    ids = tokenizer.encode("o")
    assert (ids[0] == tokenizer.bos_id) == expect_bos
    assert (ids[-1] in tokenizer.eos_ids) == bool(eos)
    assert tokenizer.encode("o", add_special=False) == ids[expect_bos : len(ids) - bool(eos)]


def test_llama3_begins_with_bos_unless_told_otherwise() -> None:
    assert load(byte_pairs(pre="llama-bpe")).encode("o")[0] == load(byte_pairs()).bos_id


def test_a_space_goes_before_the_text_unless_told_otherwise() -> None:
    assert texts(load(pieces()), "hello") == ["▁hello"]
    assert texts(load(pieces(add_space_prefix=False)), "hello") == ["hello"]
    assert texts(load(pieces()), "<s>hello", parse_special=True) == ["<s>", "▁hello"]
    for metadata in (pieces(), pieces(add_space_prefix=False)):
        tokenizer = load(metadata)
        for text in ("hello", " hello", "  o  ", ""):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_stand_in_for_characters_the_vocabulary_lacks() -> None:
    tokenizer = load(pieces(add_space_prefix=False))
    assert texts(tokenizer, "é\x00") == ["<0xC3>", "<0xA9>", "<0x00>"]
    assert tokenizer.decode(tokenizer.encode("é\x00")) == "é\x00"


def test_a_user_defined_run_of_spaces_is_found_in_the_text() -> None:
    assert texts(load(pieces(add_space_prefix=False)), "o    o") == ["o", "▁▁▁▁", "o"]


def test_gemma4_merges_characters_and_takes_bytes_for_the_rest() -> None:
    tokenizer = load(spelled_pairs())
    ids = tokenizer.encode("hello wo\n\né<tool>")
    assert [tokenizer.token_text(i) for i in ids] == [
        "<s>", "hello", "▁w", "o", "\n\n", "<0xC3>", "<0xA9>", "<tool>",
    ]  # fmt: skip
    assert tokenizer.decode(ids[1:]) == "hello wo\n\né<tool>"


def test_gemma4_gives_the_ids_of_its_tokenizer_json(tmp_path: Path) -> None:
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in spelled_pairs().items()}
    special = [
        {"id": i, "content": keys["tokens"][i], "special": i < 3, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for i in (0, 1, 2, len(keys["tokens"]) - 1)
    ]  # fmt: skip
    tree = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(keys["tokens"])},
            "merges": [merge.split(" ") for merge in keys["merges"]],
        },
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = tokenizer_from_folder(tmp_path)
    assert theirs is not None
    ours = load(spelled_pairs())
    for text in ("hello wo", " hello  wo1\n\n\nhell\n w", "<s>é<tool> \n", ""):
        assert ours.encode(text)[1:] == theirs.encode(text)[len(theirs.frame[0]) :], text


def test_end_of_turn_tokens_of_every_key_and_known_name_count() -> None:
    metadata = byte_pairs(eot_token_id=5, eom_token_id=6)
    tokenizer = load(metadata)
    eos = metadata["tokenizer.ggml.eos_token_id"]
    assert tokenizer.eos_ids == {5, 6, eos}
    tokens = [*metadata["tokenizer.ggml.tokens"], "<|im_end|>", "<EOT>"]
    types = [*metadata["tokenizer.ggml.token_type"], CONTROL, NORMAL]
    tokenizer = load(byte_pairs(tokens=tokens, token_type=types))
    assert tokenizer.eos_ids == {eos, len(tokens) - 2}  # a plain-text lookalike is none


@pytest.mark.parametrize(
    ("text", "kind", "control"),
    [
        ("<|im_end|>", NORMAL, True),
        ("<|user|>", USER_DEFINED, True),
        ("<|user|>", NORMAL, False),
        ("<b>", USER_DEFINED, False),
    ],
)
def test_control_tokens_of_files_with_wrong_types_are_kept_out_of_text(
    text: str, kind: int, control: bool
) -> None:
    metadata = byte_pairs()
    tokens = [*metadata["tokenizer.ggml.tokens"], text]
    types = [*metadata["tokenizer.ggml.token_type"], kind]
    tokenizer = load(byte_pairs(tokens=tokens, token_type=types))
    assert (len(tokens) - 1 in tokenizer.special_ids) == control
    assert (len(tokens) - 1 in tokenizer.encode(f"a{text}b")) == (text == "<b>")


def test_phi3_control_tokens_swallow_the_space_after_them() -> None:
    metadata = pieces()
    tokens = [*metadata["tokenizer.ggml.tokens"], "<|user|>"]
    more = {
        "tokens": tokens,
        "scores": [*metadata["tokenizer.ggml.scores"], 0.0],
        "token_type": [*metadata["tokenizer.ggml.token_type"], CONTROL],
    }
    named = {"general.name": "Phi-3 Mini", **pieces(**more)}
    for metadata, seen in ((named, ["<|user|>", "▁hello"]), (pieces(**more), None)):
        found = texts(load(metadata), "<|user|>\n hello", parse_special=True)
        assert (found == seen) == (seen is not None)


def test_templates_come_by_name() -> None:
    metadata = byte_pairs()
    metadata["tokenizer.chat_template"] = "a"
    metadata["tokenizer.chat_template.tool_use"] = "b"
    metadata["tokenizer.chat_templates"] = ["tool_use"]
    assert load(metadata).chat_templates == {"default": "a", "tool_use": "b"}
    assert load(byte_pairs()).chat_template is None


def test_templates_know_the_named_tokens() -> None:
    tokenizer = load(byte_pairs())
    message = [{"role": "user", "content": "x"}]
    text = tokenizer.render_chat(message, chat_template="{{ bos_token }}|{{ eos_token }}")
    assert text == "<s>|</s>"


def test_a_file_without_a_vocabulary_has_no_tokenizer() -> None:
    assert tokenizer_from_metadata({}) is None
    assert tokenizer_from_metadata({"tokenizer.ggml.model": "none"}) is None


@pytest.mark.parametrize("model", ["t5", "bert", "rwkv", "plamo2", "something"])
def test_other_kinds_of_vocabulary_are_refused_by_name(model: str) -> None:
    with pytest.raises(UnsupportedModel, match=repr(model)):
        tokenizer_from_metadata(byte_pairs(model=model))


def test_an_unknown_pre_tokenizer_is_an_error_never_a_guess() -> None:
    with pytest.raises(UnsupportedModel, match="'brand-new'"):
        tokenizer_from_metadata(byte_pairs(pre="brand-new"))
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.ggml\.pre is missing"):
        tokenizer_from_metadata(byte_pairs(pre=None))


@pytest.mark.parametrize(
    ("metadata", "fault"),
    [
        (byte_pairs(tokens=None), "tokenizer.ggml.tokens is missing"),
        (byte_pairs(tokens=[]), "tokenizer.ggml.tokens is missing"),
        (byte_pairs(tokens=[1, 2]), "holds no text"),
        (byte_pairs(tokens="abc"), "holds no text"),
        (byte_pairs(merges=None), "merges is missing"),
        (byte_pairs(merges=["ab"]), r"merges\[0\] is no pair"),
        (byte_pairs(merges=["h zz"]), "do not fit"),
        (byte_pairs(token_type=[1]), "token_type has 1 entries"),
        (byte_pairs(eos_token_id=10**6), "eos_token_id is 1000000, outside"),
        (byte_pairs(bos_token_id="x"), "bos_token_id is 'x'"),
        (byte_pairs(add_bos_token=True, bos_token_id=None), "bos_token_id is missing"),
        (byte_pairs(tokens=["a", "a"], token_type=[1, 1]), "'a' twice"),
        (pieces(scores=[0.0]), "scores has 1 entries"),
        (pieces(scores=["x"] * 300), "holds no numbers"),
    ],
)
def test_damage_is_named(metadata: dict[str, Any], fault: str) -> None:
    with pytest.raises(TokenizerError, match=fault):
        tokenizer_from_metadata(metadata)
