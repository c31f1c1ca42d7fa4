"""From a path to a checkpoint: which format lies there, or why there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from localllm.checkpoint.base import Checkpoint
from localllm.checkpoint.folder import FolderCheckpoint
from localllm.checkpoint.gguf import GGUFCheckpoint, part_paths
from localllm.checkpoint.shards import INDEX, find_shards, is_shard
from localllm.checkpoint.weight_file import WeightFile
from localllm.errors import CheckpointError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder of safetensors, a folder with one .gguf model, a .gguf file (any part of a
    split one), or a .safetensors file with its config.json beside it (a shard: the whole model).

    Headers are read and checked, weights are not. Raises `CheckpointError` naming the file for
    what is missing or damaged, `UnsupportedModel` for a format or quantization that is not read.
    """
    path = Path(path)
    try:
        return _open(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def content_digest(path: str | Path) -> bytes:
    """The `files_digest` of the checkpoint's files; reads them all. Raises what `open_checkpoint`
    raises."""
    checkpoint = open_checkpoint(path)
    try:
        files = checkpoint.files()
    finally:
        checkpoint.close()
    return files_digest(files)


def sha256s(files: Sequence[Path]) -> list[str]:
    """The sha256 of each file's bytes, in hex. Raises OSError."""
    found = []
    for file in files:
        with file.open("rb") as stream:
            found.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return found


def files_digest(
    files: Sequence[Path], hashes: Callable[[Sequence[Path]], Sequence[str]] = sha256s
) -> bytes:
    """A sha256 of the files' names and contents. hashes: as `sha256s`, for those who remember."""
    digest = hashlib.sha256()
    for file, sha256 in zip(files, hashes(files), strict=True):
        digest.update(f"{file.name}\0{sha256}\0".encode())
    return digest.digest()


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise _pickle(path)
    if suffix == ".safetensors":
        return _open_lone_file(path)
    if suffix == ".gguf" or _starts_like_gguf(path):
        return GGUFCheckpoint(path)
    raise CheckpointError(
        f"{path}: is neither a .gguf nor a .safetensors file",
        hint="Name a folder with config.json and safetensors, or a .gguf file.",
    )


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / INDEX).exists() or find_shards(folder):
        if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{folder}: holds an adapter, not a model", hint="Open its base model instead."
            )
        return FolderCheckpoint(folder)
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        models = sorted({part_paths(path)[0] for path in ggufs})
        if len(models) > 1:
            raise CheckpointError(
                f"{folder}: has several models: {', '.join(path.name for path in models)}",
                hint="Name the .gguf file to open.",
            )
        return GGUFCheckpoint(models[0])
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _PICKLES:
            raise _pickle(path)
    raise CheckpointError(
        f"{folder}: holds no weights: neither .safetensors nor .gguf files",
        hint="Check the path, or download the model again.",
    )


def _open_lone_file(path: Path) -> Checkpoint:
    if not (path.parent / "config.json").exists():
        WeightFile(path).close()  # a pointer or an error page is the better news
        raise CheckpointError(
            f"{path}: has no config.json beside it, so the architecture is unknown",
            hint="Put the model's config.json into the same folder.",
        )
    return FolderCheckpoint(path.parent, None if is_shard(path) else [path])


def _starts_like_gguf(path: Path) -> bool:
    file = WeightFile(path)
    try:
        return file.read(0, min(4, file.size)) == b"GGUF"
    finally:
        file.close()


def _pickle(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: pickled weights are never loaded, since opening them can run any program",
        hint="Get the model as safetensors or GGUF, or convert it on a machine you can lose: "
        "transformers' save_pretrained writes safetensors.",
    )
