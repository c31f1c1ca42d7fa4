"""Tokenizers of the real models, and small ones made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from localllm.checkpoint import open_checkpoint
from localllm.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.templates import Known

Make = Callable[..., Tokenizer]


def metadata_of(path: Path) -> Mapping[str, Any]:
    checkpoint = open_checkpoint(path)
    try:
        return checkpoint.config
    finally:
        checkpoint.close()


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2: Path) -> Mapping[str, Any]:
    return metadata_of(smollm2)


@pytest.fixture(scope="session")
def gemma3_metadata(gemma3: Path) -> Mapping[str, Any]:
    return metadata_of(gemma3)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path, smollm2_metadata: Mapping[str, Any]) -> Tokenizer:
    return _loaded(smollm2, smollm2_metadata)


@pytest.fixture(scope="session")
def gemma3_tokenizer(gemma3: Path, gemma3_metadata: Mapping[str, Any]) -> Tokenizer:
    return _loaded(gemma3, gemma3_metadata)


def _loaded(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    tokenizer = load_tokenizer(path, metadata)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def trained() -> str:
    """tokenizer.json of a small byte-level BPE without control tokens."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words = "user assistant system model the end start turn im of think tool call role text\n"
    inner.train_from_iterator(
        [words * 3, "Hello, how are you? <|end|> <eos> [INST] |> </s>"], trainer
    )
    return inner.to_str()


@pytest.fixture(scope="session")
def build(trained: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a folder with a known template and its control tokens, and loads it."""

    def make(known: Known, **settings: Any) -> Tokenizer:
        folder = tmp_path_factory.mktemp("tokenizer")
        inner = reference(trained, known)
        inner.save(str(folder / "tokenizer.json"))
        written = {
            "chat_template": known.template,
            "bos_token": bos_of(known),
            "eos_token": eos_of(known),
            **settings,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(written), "utf-8")
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        return tokenizer

    return make


def reference(trained: str, known: Known) -> tokenizers.Tokenizer:
    """The library on its own, with the known model's added tokens."""
    inner = tokenizers.Tokenizer.from_str(trained)
    inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in known.special])
    inner.add_tokens([AddedToken(t, normalized=False, special=False) for t in known.ordinary])
    return inner


def bos_of(known: Known) -> str:
    begins = ("<bos>", "<|begin_of_text|>", "<s>")
    return next((t for t in begins if t in known.special), known.special[0])


def eos_of(known: Known) -> str:
    ends = ("<|im_end|>", "<eos>", "<|eot_id|>", "</s>", "<|endoftext|>", "<|end_of_text|>")
    ends += ("<|return|>", "<turn|>", "<|user|>")
    return next(t for t in ends if t in known.special)
