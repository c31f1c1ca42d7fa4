"""What a run is made of, from the config."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from localllm.errors import UnsupportedModel
from localllm.train.config import make_config
from localllm.train.parts import open_data
from tests.tiny_model import write_tiny_model


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A model and data by their names in the folder one is in."""
    write_tiny_model(tmp_path / "tiny")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "one two three"}) + "\n")
    monkeypatch.chdir(tmp_path)
    return make_config({"model": "tiny", "data": {"source": "data.jsonl", "valid": "data.jsonl"}})


def test_files_are_known_by_their_full_paths(config, tmp_path, monkeypatch):
    found = open_data(config).config
    assert found.model == str(tmp_path / "tiny")
    assert found.data.source == found.data.valid == str(tmp_path / "data.jsonl")
    monkeypatch.chdir("/")
    assert open_data(found).config == found


def test_a_tokenizer_larger_than_the_embedding_is_refused(config, tmp_path):
    path = str(tmp_path / "tiny" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save(path)
    with pytest.raises(UnsupportedModel, match="has 261 tokens and its embedding only 260 rows"):
        open_data(config)
