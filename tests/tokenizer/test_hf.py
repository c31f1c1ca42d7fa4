"""Folders as Hugging Face has them: tokenizer.json, tokenizer.model and the files beside them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from localllm.errors import TokenizerError, UnsupportedModel
from localllm.tokenizer import Tokenizer, load_tokenizer

HARD = "Hello  <s>wörld</s>\n\n 12 👩‍👩‍👧 e\u0301 "


def write(folder: Path, inner: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
    """Writes tokenizer.json and, under their names without .json, further JSON files."""
    if inner is not None:
        inner.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    return folder


def load(folder: Path, config: dict[str, Any] | None = None) -> Tokenizer:
    tokenizer = load_tokenizer(folder, config)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture
def byte_level(trained: str) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer.from_str(trained)
    inner.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    return inner


@pytest.fixture
def metaspace() -> tokenizers.Tokenizer:
    """A tokenizer in the manner of Llama 2: a space before every piece, bytes for the rest."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"Helord"]
    inner = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return inner


@pytest.fixture(scope="module")
def proto() -> bytes:
    """A SentencePiece model as trained by the library itself."""
    out = io.BytesIO()
    lines = ["Hello world, how are you today?", "the quick brown fox 12345", "Hello there"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    return out.getvalue()


def test_ids_are_the_librarys_own(
    tmp_path: Path, byte_level: tokenizers.Tokenizer, metaspace: tokenizers.Tokenizer
) -> None:
    for i, inner in enumerate((byte_level, metaspace)):
        (tmp_path / str(i)).mkdir()
        tokenizer = load(write(tmp_path / str(i), inner))
        expected = inner.encode(HARD, add_special_tokens=False).ids
        assert tokenizer.encode(HARD, add_special=False, parse_special=True) == expected
        assert tokenizer.encode("Hello") == inner.encode("Hello").ids


def test_text_never_spells_a_control_token_unless_asked(
    tmp_path: Path, metaspace: tokenizers.Tokenizer
) -> None:
    tokenizer = load(write(tmp_path, metaspace))
    ids = tokenizer.encode(HARD, add_special=False)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == HARD


def test_decoding_is_the_librarys_own(
    tmp_path: Path, byte_level: tokenizers.Tokenizer, metaspace: tokenizers.Tokenizer
) -> None:
    for i, inner in enumerate((byte_level, metaspace)):
        (tmp_path / str(i)).mkdir()
        tokenizer = load(write(tmp_path / str(i), inner))
        ids = tokenizer.encode("Hello <s> wörld 👍 ", parse_special=True)
        assert tokenizer.decode(ids) == inner.decode(ids)
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, ids), stream.finish()]) == inner.decode(ids)


def test_flags_of_control_tokens_hold_in_chats_too(tmp_path: Path, trained: str) -> None:
    inner = tokenizers.Tokenizer.from_str(trained)
    inner.add_special_tokens(
        [
            AddedToken("<l>", lstrip=True, special=True),
            AddedToken("<r>", rstrip=True, special=True),
            AddedToken("<w>", single_word=True, special=True),
        ]
    )
    tokenizer = load(write(tmp_path, inner))
    for text in ("a <l> b", "a <r> b", "a<w>b <w> c", "<r>\n\n<l>"):
        assert tokenizer.encode(text, parse_special=True) == inner.encode(text).ids


def test_a_space_for_the_first_piece_only_stays_with_the_first(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "▁", *"ab<s/>"]
    inner = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    inner.add_special_tokens(["<s>"])
    tokenizer = load(write(tmp_path, inner))
    for text in ("a<s>b", "<s>b", "a"):
        assert tokenizer.encode(text, parse_special=True) == inner.encode(text).ids
    ids = tokenizer.apply_chat(
        [{"role": "user", "content": "b<s>"}], chat_template="a<s>{{ messages[0].content }}"
    )
    assert [tokenizer.token_text(i) for i in ids] == ["▁", "a", "<s>", "b", "<", "s", ">"]


def test_limits_and_padding_of_training_are_left_behind(
    tmp_path: Path, byte_level: tokenizers.Tokenizer
) -> None:
    byte_level.enable_truncation(4)
    byte_level.enable_padding(length=8)
    tokenizer = load(write(tmp_path, byte_level))
    assert tokenizer.decode(tokenizer.encode("a long text, longer than four")) == (
        "a long text, longer than four"
    )


@pytest.mark.parametrize(
    ("settings", "begins", "ends"),
    [
        ({}, True, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"add_bos_token": False}, False, False),
        ({"add_bos_token": None}, True, False),
    ],
)
def test_begin_and_end_follow_the_post_processor_unless_the_settings_say(
    tmp_path: Path,
    metaspace: tokenizers.Tokenizer,
    settings: dict[str, Any],
    begins: bool,
    ends: bool,
) -> None:
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = load(write(tmp_path, metaspace, tokenizer_config={**named, **settings}))
    ids = tokenizer.encode("Hello")
    assert (ids[0] == 1) == begins
    assert (ids[-1] == 2) == ends


def test_end_ids_come_from_every_file(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = load(
        write(
            tmp_path,
            byte_level,
            tokenizer_config={"eos_token": {"content": "</s>"}},
            generation_config={"eos_token_id": [5, 6]},
            config={"eos_token_id": 7},
        )
    )
    known = byte_level.token_to_id("<|im_end|>")
    assert tokenizer.eos_ids == {byte_level.token_to_id("</s>"), 5, 6, 7, known}
    assert load(tmp_path, {"eos_token_id": 8}).eos_ids == tokenizer.eos_ids - {7} | {8}


def test_tokens_named_special_are_special_whatever_tokenizer_json_says(
    tmp_path: Path, trained: str
) -> None:
    inner = tokenizers.Tokenizer.from_str(trained)
    inner.add_tokens(["<end>", "<extra>", "<plain>"])
    settings = {"eos_token": "<end>", "additional_special_tokens": [{"content": "<extra>"}]}
    tokenizer = load(write(tmp_path, inner, tokenizer_config=settings))
    special = {inner.token_to_id("<end>"), inner.token_to_id("<extra>")}
    assert tokenizer.special_ids == special
    text = "a<end>b<extra>c<plain>d"
    assert not special & set(tokenizer.encode(text))
    assert inner.token_to_id("<plain>") in tokenizer.encode(text)
    assert tokenizer.encode(text, parse_special=True) == inner.encode(text).ids


def test_special_tokens_map_fills_what_the_settings_lack(
    tmp_path: Path, byte_level: tokenizers.Tokenizer
) -> None:
    tokenizer = load(write(tmp_path, byte_level, special_tokens_map={"bos_token": "<s>"}))
    assert tokenizer.bos_id == byte_level.token_to_id("<s>")


def test_tokens_that_only_the_settings_add_get_their_ids(
    tmp_path: Path, byte_level: tokenizers.Tokenizer
) -> None:
    after = byte_level.get_vocab_size()
    added = {str(after): {"content": "<new>", "special": True}}
    tokenizer = load(write(tmp_path, byte_level, tokenizer_config={"added_tokens_decoder": added}))
    assert tokenizer.encode("<new>", parse_special=True) == [after]
    assert tokenizer.vocab_size == after + 1
    (tmp_path / "wrong").mkdir()
    wrong = {"added_tokens_decoder": {str(after + 9): {"content": "<new>", "special": True}}}
    with pytest.raises(TokenizerError, match="'<new>' the id"):
        load(write(tmp_path / "wrong", byte_level, tokenizer_config=wrong))


def test_gaps_in_the_ids_confuse_no_token(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 9, "<s>": 5, "?": 3}, "?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(["<s>"])
    tokenizer = load(write(tmp_path, inner))
    assert tokenizer.vocab_size == 10
    assert tokenizer.encode("a <s> b", parse_special=True) == [0, 5, 9]
    assert tokenizer.decode([0, 5, 9, 4], skip_special=False) == "a<s>b"


def test_templates_are_read_from_wherever_they_may_stand(
    tmp_path: Path, byte_level: tokenizers.Tokenizer
) -> None:
    write(tmp_path, byte_level, tokenizer_config={"chat_template": "settings"})
    assert load(tmp_path).chat_template == "settings"
    (tmp_path / "chat_template.jinja").write_text("file", "utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("more", "utf-8")
    assert load(tmp_path).chat_templates == {"default": "file", "rag": "more"}


def test_templates_see_named_tokens(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    settings = {"bos_token": "<s>", "extra_special_tokens": {"image_token": "</s>"}}
    tokenizer = load(write(tmp_path, byte_level, tokenizer_config=settings))
    source = "{{ bos_token }}{{ image_token }}"
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(messages, chat_template=source) == "<s></s>"
    ids = tokenizer.apply_chat(messages, chat_template=source)
    assert ids == [byte_level.token_to_id("<s>"), byte_level.token_to_id("</s>")]


def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    assert load_tokenizer(tmp_path) is None


def test_faults_name_the_file(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not"):
        load_tokenizer(tmp_path)
    write(tmp_path, byte_level)
    (tmp_path / "tokenizer_config.json").write_text("[]", "utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json must hold"):
        load_tokenizer(tmp_path)


def test_other_formats_are_refused_by_name(
    tmp_path: Path, byte_level: tokenizers.Tokenizer
) -> None:
    (tmp_path / "tekken.json").write_text("{}", "utf-8")
    with pytest.raises(UnsupportedModel, match=r"tekken\.json"):
        load_tokenizer(tmp_path)
    byte_level.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModel, match="'WordPiece'"):
        load_tokenizer(write(tmp_path, byte_level))


# tokenizer.model


def test_a_sentencepiece_model_gives_the_librarys_ids(tmp_path: Path, proto: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(proto)
    original = sentencepiece.SentencePieceProcessor(model_proto=proto)
    tokenizer = load(tmp_path)
    for text in ("Hello world", " two  spaces ", HARD, "a<tool>b", "", "\x00\n\t"):
        expected = original.encode(text)
        assert tokenizer.encode(text, add_special=False) == expected
        assert tokenizer.encode(text) == [original.bos_id(), *expected]
        assert tokenizer.decode(expected) == text == original.decode(expected)
    assert tokenizer.bos_id == original.bos_id()
    assert tokenizer.eos_ids == {original.eos_id()}


@pytest.mark.parametrize(("legacy", "spaced"), [(True, True), (False, False)])
def test_the_space_after_a_control_token_is_there_in_legacy_mode_only(
    tmp_path: Path, proto: bytes, legacy: bool, spaced: bool
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(proto)
    tokenizer = load(write(tmp_path, tokenizer_config={"legacy": legacy}))
    ids = tokenizer.encode("Hello<s>Hello", add_special=False, parse_special=True)
    first, second = (tokenizer.token_text(i) for i in (ids[0], ids[ids.index(1) + 1]))
    assert first == "▁Hello"
    assert second.startswith("▁") == spaced


def test_tokens_added_to_a_sentencepiece_model_are_found(tmp_path: Path, proto: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(proto)
    size = sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size()
    write(
        tmp_path,
        added_tokens={"<think>": size, "<|im_end|>": size + 1},
        tokenizer_config={"additional_special_tokens": ["<|im_end|>"], "legacy": False},
    )
    tokenizer = load(tmp_path)
    assert tokenizer.vocab_size == size + 2
    assert size in tokenizer.encode("Hello <think> you")
    assert size + 1 not in tokenizer.encode("Hello <|im_end|>")
    assert size + 1 in tokenizer.encode("Hello <|im_end|>", parse_special=True)
    assert size + 1 in tokenizer.eos_ids
    ids = tokenizer.encode("Hello <think> you")
    assert tokenizer.decode(ids) == "Hello <think> you"


def test_a_model_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n", "utf-8")
    with pytest.raises(TokenizerError, match="sentencepiece refuses"):
        load_tokenizer(tmp_path)
