"""Encode, decode (UTF-8 safe, streaming) and chat templates, for every kind of vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localllm.tokenizer.base import Tokenizer
from localllm.tokenizer.stream import StreamDecoder

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]


def load_tokenizer(path: Path | str, config: Mapping[str, Any] | None = None) -> Tokenizer | None:
    """The tokenizer of a model, or None where its files hold none.

    path: a folder as Hugging Face has them, or a GGUF file.
    config: the folder's config.json, or the GGUF file's metadata; None reads it from there.
    Raises `TokenizerError` for damaged files, `UnsupportedModel` for kinds we do not run.
    """
    path = Path(path)
    if path.is_dir():
        from localllm.tokenizer.hf import tokenizer_from_folder

        return tokenizer_from_folder(path, config)
    from localllm.tokenizer.gguf import tokenizer_from_metadata

    if config is None:
        from localllm.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(path)
        try:
            config = checkpoint.config
        finally:
            checkpoint.close()
    return tokenizer_from_metadata(config)
