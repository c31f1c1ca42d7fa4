"""Which files of a folder make up the model: the index, numbered shards, or a single file."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

from localllm.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 64 << 20
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


def is_shard(path: Path) -> bool:
    """Whether the name says that the file is only a part of a model."""
    match = _SHARD.fullmatch(path.name)
    return match is not None and match[3] != "00001"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises `CheckpointError`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            raise CheckpointError(f"{path}: is not a regular file")
        if status.st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: is larger than {_MAX_JSON_BYTES >> 20} MiB")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, or nothing when the folder has no index."""
    path = folder / INDEX
    if not path.exists():
        return {}
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path}: has no 'weight_map' of tensors and files")
    for tensor, file in names.items():
        # A plain name only: an index must not reach out of its folder.
        where = f"{path}: tensor {tensor!r} is in {file!r}"
        if not isinstance(file, str) or not file.isprintable():
            raise CheckpointError(f"{where}, not a file name")
        if Path(file).name != file or "\\" in file:
            raise CheckpointError(f"{where}, not a file name of this folder")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{where}, no safetensors file")
    for file in sorted(set(names.values())):
        if not (folder / file).exists():
            raise CheckpointError(
                f"{folder}: shard {file} is missing, which {INDEX} names",
                hint="Download the missing file into the folder.",
            )
    return names


def find_shards(folder: Path) -> list[Path]:
    """The weight files of a folder without an index; empty when it has none.

    Raises `CheckpointError` when shards are missing, or several files could be the model.
    """
    found = sorted(folder.glob("*.safetensors"))
    model = [path for path in found if path.name.startswith("model")] or found
    parts = [match for path in model if (match := _SHARD.fullmatch(path.name))]
    if len(model) > max(1, len(parts)):
        raise CheckpointError(
            f"{folder}: has several models: {', '.join(path.name for path in model)}",
            hint="Name the file to open.",
        )
    here = {path.name for path in model}
    for stem, _, count in (part.groups() for part in parts):
        for number in range(1, int(count) + 1):
            name = f"{stem}-{number:05d}-of-{count}.safetensors"
            if name not in here:
                raise CheckpointError(
                    f"{folder}: shard {name} is missing",
                    hint="Download the missing file into the folder.",
                )
    return model
