"""Vocabularies written for other readers give the same ids when they are read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.checkpoint import open_checkpoint
from localllm.errors import UnsupportedModel
from localllm.tokenizer import Tokenizer, load_tokenizer
from localllm.tokenizer.gguf import tokenizer_from_metadata
from localllm.tokenizer.gguf_vocabulary import gguf_vocabulary
from localllm.tokenizer.hub_files import hub_tokenizer_files
from localllm.tokenizer.sentence import SPACE
from tests.tokenizer.test_gguf import byte_pairs, load, pieces
from tests.tokenizer.texts import HARD

CHAT = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"


def as_folder(metadata: dict[str, object], folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    for name, text in hub_tokenizer_files(metadata).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text("{}")
    found = load_tokenizer(folder)
    assert found is not None
    return found


def back(folder: Path, size: int) -> Tokenizer:
    found = tokenizer_from_metadata(gguf_vocabulary(folder, size))
    assert found is not None
    return found


def hold_same(ours: Tokenizer, theirs: Tokenizer, text: str) -> None:
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.encode(text, add_special=False) == ours.encode(text, add_special=False)
    ids = ours.encode(text, add_special=False)
    assert theirs.decode(ids) == ours.decode(ids)


@pytest.fixture(scope="module")
def real(request, tmp_path_factory) -> dict[str, tuple[Tokenizer, Tokenizer, Tokenizer]]:
    """Of each real vocabulary: the GGUF file's, the folder's made of it, the one made of that."""
    found = {}
    for name in ("smollm2", "gemma3"):
        checkpoint = open_checkpoint(request.getfixturevalue(name))
        metadata = dict(checkpoint.config)
        size = checkpoint.shape("token_embd.weight")[0]
        checkpoint.close()
        folder = tmp_path_factory.mktemp(name) / "folder"
        found[name] = (load(metadata), as_folder(metadata, folder), back(folder, size))
    return found


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_vocabularies_give_the_same_ids_there_and_back(name: str, real) -> None:
    ours, folder, again = real[name]
    for text in HARD.values():
        if name == "gemma3" and SPACE in text:
            continue  # what spells a space's stand-in itself is cut otherwise by `tokenizers`
        hold_same(ours, folder, text)
        hold_same(ours, again, text)
    assert folder.eos_ids == again.eos_ids == ours.eos_ids
    if ours.chat_template is None:
        return
    chat = [{"role": "user", "content": "Why <end_of_turn> <|im_end|>?"}]
    assert folder.apply_chat(chat) == again.apply_chat(chat) == ours.apply_chat(chat)


@given(text=st.text(max_size=40))
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_any_text_does(name: str, text: str, real) -> None:
    ours, folder, again = real[name]
    text = text.replace(SPACE, "")
    hold_same(ours, folder, text)
    hold_same(ours, again, text)


@pytest.mark.parametrize("changes", [{}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("make", [byte_pairs, pieces])
def test_frames_added_tokens_and_templates_are_kept(make, changes, tmp_path: Path) -> None:
    metadata = make(**changes) | {
        "tokenizer.chat_template": CHAT,
        "tokenizer.chat_template.tools": CHAT + "!",
    }
    ours, folder = load(metadata), as_folder(metadata, tmp_path / "out")
    size = len(metadata["tokenizer.ggml.tokens"])
    again = back(tmp_path / "out", size)
    texts = ["hello wo", "</s>", " he  llo", ""]
    if make is byte_pairs:  # with a space before every text, `tokenizers` puts it after <tool>
        texts.append("<tool>hell\n\n    12")
    for text in texts:
        hold_same(ours, folder, text)
        hold_same(ours, again, text)
    assert folder.chat_templates == again.chat_templates == ours.chat_templates
    assert folder.bos_id == again.bos_id == ours.bos_id


def test_a_way_of_cutting_text_that_has_no_name_is_refused(tmp_path: Path) -> None:
    as_folder(byte_pairs(), tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[a-f]+"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(UnsupportedModel, match="no name"):
        gguf_vocabulary(tmp_path, 500)


def test_an_embedding_that_is_larger_is_filled_up(tmp_path: Path) -> None:
    as_folder(byte_pairs(), tmp_path)
    tokens = gguf_vocabulary(tmp_path, 300)["tokenizer.ggml.tokens"]
    assert len(tokens) == 300
    assert tokens[-1] == "[PAD299]"
