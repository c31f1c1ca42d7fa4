"""Names to files: the catalog, the sources (`hf:`, `pypi:`, local paths) and the store."""

from localllm.hub.catalog import CatalogEntry, load_catalog
from localllm.hub.library import (
    StoredModel,
    installed,
    pull,
    remove,
    resolve,
    size_on_disk,
    verify,
)
from localllm.hub.manifest import Manifest
from localllm.hub.names import parse_name
from localllm.hub.progress import Progress

__all__ = [
    "CatalogEntry",
    "Manifest",
    "Progress",
    "StoredModel",
    "installed",
    "load_catalog",
    "parse_name",
    "pull",
    "remove",
    "resolve",
    "size_on_disk",
    "verify",
]
