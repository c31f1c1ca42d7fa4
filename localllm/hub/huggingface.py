"""`hf:` models: the repository is listed, the right files chosen, fetched and checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from localllm.errors import DownloadError, ModelNotFound, UnsupportedModel
from localllm.hub.catalog import Source
from localllm.hub.disk import require_space, telling_os_errors
from localllm.hub.environment import is_set
from localllm.hub.fetched import Fetched, check_gguf, check_pinned
from localllm.hub.hub_client import HubClient, RemoteFile
from localllm.hub.manifest import StoredFile
from localllm.hub.progress import Progress
from localllm.hub.refs import HubRef
from localllm.hub.select import FOLDER_FILES, INDEX, choose_gguf, choose_weights

_MAX_INDEX = 64 << 20  # bytes; the index of a very large model has a few MB


def fetch_repository(ref: HubRef, source: Source, work: Path, progress: Progress) -> Fetched:
    """Fetch the model in `ref` into `work`; what a dead pull of the same commit left is used.

    Raises ModelNotFound, UnsupportedModel, DownloadError or StoreError.
    """
    if is_set("HF_HUB_OFFLINE"):
        raise DownloadError(
            f"{ref} cannot be fetched: HF_HUB_OFFLINE is set",
            hint="unset HF_HUB_OFFLINE, or use a model that `localllm list` shows",
        )
    client = HubClient(ref, progress)
    listing = client.listing()
    folder = _commit_folder(work, listing.commit)
    staged, incomplete = folder / "model", folder / "incomplete"
    with telling_os_errors(work):
        staged.mkdir(parents=True, exist_ok=True)
        incomplete.mkdir(exist_ok=True)

    def fetch(file: RemoteFile, done: int, total: int) -> StoredFile:
        def update(count: int) -> None:
            progress.update(f"downloading {file.name}", done + count, total)

        # A .gguf may lie in a folder of the repository; here it stands alone.
        target = staged / Path(file.name).name
        return client.download(file, target, incomplete, update)

    names = _choose(ref, list(listing.names), progress)
    files: list[StoredFile] = []
    if INDEX in names:
        index = client.describe(INDEX)
        if index.size > _MAX_INDEX:
            raise DownloadError(f"{ref}: {INDEX} has {index.size} bytes")
        files.append(fetch(index, 0, index.size))
        names.remove(INDEX)
        names += _indexed(ref, staged / INDEX, listing.names)
    wanted = [client.describe(name) for name in names]
    total = sum(file.size for file in wanted)
    here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    require_space(total - here, work)
    done = 0
    for file in wanted:
        files.append(fetch(file, done, total))
        if file.name.endswith(".gguf"):
            check_gguf(staged / Path(file.name).name)
        done += file.size
    check_pinned(source.files, tuple(files))
    shutil.rmtree(incomplete, ignore_errors=True)
    return Fetched(staged, tuple(files), listing.commit, listing.licence)


def _commit_folder(work: Path, commit: str) -> Path:
    """Where this commit's files go. Those of another commit must not mix with them."""
    folder = work / commit[:40].replace("/", "_")
    with telling_os_errors(work):
        if work.is_dir():
            for other in work.iterdir():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
    return folder


def _choose(ref: HubRef, names: list[str], progress: Progress) -> list[str]:
    """The files to fetch; of an indexed checkpoint the shards are still to come."""
    root = {name for name in names if "/" not in name}
    repo = f"hf:{ref.repo}"
    folder = sorted(root & FOLDER_FILES)
    has_weights = any(name.endswith(".safetensors") for name in root)
    if ref.file is None and "config.json" in root and has_weights:
        if INDEX in root:
            return folder
        if weights := choose_weights(root, None):
            return [*folder, *weights]
    choice = choose_gguf(repo, names, ref.file)
    if choice is None:
        raise _no_model(repo, root)
    if choice.others:
        others = ", ".join(choice.others[:12])
        progress.say(
            f"{repo} holds several quantizations; taking {choice.quantization or choice.file} "
            f"({choice.file}). Others, as {repo}:NAME: {others}"
        )
    return [choice.file]


def _no_model(repo: str, root: set[str]) -> ModelNotFound | UnsupportedModel:
    if "adapter_config.json" in root:
        return UnsupportedModel(
            f"{repo} is an adapter, not a model", hint="pull the model it was trained on"
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in root):
        return UnsupportedModel(
            f"{repo} has its weights in pickle files only, which can run code and are not loaded",
            hint="look for a repository with .safetensors or .gguf files",
        )
    return ModelNotFound(
        f"{repo} holds no model: neither .safetensors with a config.json nor a .gguf",
        hint="look for another repository of the model",
    )


def _indexed(ref: HubRef, path: Path, names: tuple[str, ...]) -> list[str]:
    """The shards an index lists, each of which must be a file of the repository's root."""
    try:
        shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DownloadError(f"hf:{ref.repo}: {INDEX} is damaged ({error!r})") from error
    for shard in shards:
        if not isinstance(shard, str) or "/" in shard or not shard.endswith(".safetensors"):
            raise DownloadError(f"hf:{ref.repo}: {INDEX} names an odd file: {shard!r}")
        if shard not in names:
            raise DownloadError(f"hf:{ref.repo}: {shard}, which {INDEX} names, is not there")
    if not shards:
        raise DownloadError(f"hf:{ref.repo}: {INDEX} names no files")
    return choose_weights(names, shards)
