"""All weights as trained, as a model folder: config.json, float32 safetensors, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.atomic import write_bytes, write_json
from localllm.checkpoint.streaming import Entry, SafetensorsWriter
from localllm.checkpoint.tensor import Dense, Tensor
from localllm.errors import CheckpointError
from localllm.files import sync_folder
from localllm.models.hub_config import hub_config
from localllm.models.layout import norm_offset, own_prefix
from localllm.models.registry import ARCHITECTURES
from localllm.models.writing import gather, stored_tensors, to_dense
from localllm.spec import DecoderSpec
from localllm.tokenizer import load_tokenizer
from localllm.tokenizer.hub_files import hub_tokenizer_files

CONFIG = "config.json"
_BESIDE = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_MAX_BESIDE = 256 << 20


def write_model(
    folder: Path,
    spec: DecoderSpec,
    weights: Mapping[str, np.ndarray],
    *,
    beside: Path,
    config: Mapping[str, Any] | None = None,
) -> None:
    """weights: float32, by the names of `weight_shapes(spec)`.

    beside: the model (or folder) whose tokenizer goes with it. config: a new model's config.json;
    None writes that of `beside`. A kill leaves a folder without config.json, which is no model.
    Raises CheckpointError where it cannot be written, UnsupportedModel for an architecture whose
    weights have no place in such a folder.
    """
    told, files = _beside(beside, spec, config)
    names = ARCHITECTURES[spec.architecture].names
    offset = norm_offset(spec.architecture)
    wanted = stored_tensors(spec, names, own_prefix(spec.architecture), norm_offset=offset)
    place = {name: number for number, name in enumerate(weights)}
    order = sorted(wanted, key=lambda stored: max(place[part] for part in stored.parts))
    entries = [Entry(stored.name, "F32", stored.shape) for stored in order]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from error
    with SafetensorsWriter(folder / "model.safetensors", entries) as writer:
        for stored, parts in gather(wanted, _tensors(weights)):
            whole = stored.assemble([part.to_float32() for part in parts])
            writer.write(stored.name, to_dense(whole, "float32").data)
    for name, content in files.items():
        write_bytes(folder / name, content)
    write_json(folder / CONFIG, told)


def _tensors(weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    for name, array in weights.items():
        yield name, Dense(array, "float32")


def _beside(
    path: Path, spec: DecoderSpec, config: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of config.json, and the files of the tokenizer."""
    files: dict[str, bytes] = {}
    told: dict[str, Any] = {}
    if path.is_file() or config is None:
        checkpoint = open_checkpoint(path)
        try:
            told = hub_config(checkpoint, spec) if config is None else {}
            if checkpoint.format == "gguf":
                texts = hub_tokenizer_files(checkpoint.config)
                files = {name: text.encode() for name, text in texts.items()}
                tokenizer = load_tokenizer(path, checkpoint.config)
                if tokenizer is not None:
                    ends = {"eos_token_id": sorted(tokenizer.eos_ids)}
                    files["generation_config.json"] = json.dumps(ends).encode()
        finally:
            checkpoint.close()
    if path.is_dir():
        for found in (path / name for name in _BESIDE):
            if found.is_file() and found.stat().st_size <= _MAX_BESIDE:
                files[found.name] = found.read_bytes()
    if config is not None:
        told = {**config, "vocab_size": spec.vocab_size, "tie_word_embeddings": spec.tied_head}
    told["dtype"] = "float32"
    return told, files
