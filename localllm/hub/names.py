"""What a user types, read as a reference to a model."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from localllm.errors import ModelNotFound
from localllm.hub.catalog import Catalog, load_catalog
from localllm.hub.refs import MAX_NAME, CatalogRef, LocalRef, ModelRef, parse_source

OTHER_KINDS = (
    "a model is a catalog name (see `localllm list --catalog`), a path such as ./model.gguf, "
    "hf:owner/repo or pypi:package"
)


def parse_name(text: str, catalog: Catalog | None = None) -> ModelRef:
    """The model `text` names: `hf:…`, `pypi:…`, a catalog name, or a local path.

    Catalog names win over a folder of the same name (write ./name for the folder), so that a
    command means the same in every directory. Raises ModelNotFound with close matches.
    """
    name = text.strip()
    if not name:
        raise ModelNotFound("the model name is empty", hint=OTHER_KINDS)
    if len(name) > MAX_NAME and not _looks_like_path(name):
        raise ModelNotFound(f"the model name {name[:40]!r}… is too long", hint=OTHER_KINDS)
    if not name.isprintable():
        raise ModelNotFound(f"the model name {name!r} has control characters", hint=OTHER_KINDS)
    if source := parse_source(name):
        return source
    if _looks_like_path(name):
        return LocalRef(_expand(name))
    catalog = catalog or load_catalog()
    if entry := catalog.get(name):
        return CatalogRef(entry.name)
    if _exists(name):
        return LocalRef(_expand(name))
    raise ModelNotFound(f"no model is called {name!r}", hint=_suggest(name, catalog))


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.lower().endswith(".gguf")


def _expand(name: str) -> Path:
    try:
        return Path(name).expanduser().absolute()
    except RuntimeError as error:  # ~nobody
        raise ModelNotFound(f"{name!r}: {error}", hint=OTHER_KINDS) from error


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # a name too long for the file system
        return False


def _suggest(name: str, catalog: Catalog) -> str:
    if name.count("/") == 1 and ":" not in name.split("/")[0]:
        return f"for a repository on the hub write hf:{name}; otherwise {OTHER_KINDS}"
    close = get_close_matches(name.lower(), catalog.names(), n=3, cutoff=0.5)
    # A family typed with an unknown size (`qwen3:14b`): its sizes are the closest there is.
    family = name.lower().partition(":")[0]
    close = [known for known in catalog.names() if known.partition(":")[0] == family] or close
    meant = f"did you mean {', '.join(close)}? " if close else ""
    return meant + OTHER_KINDS
