"""The known checkpoints, read from `models/catalog.toml`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, cast, get_args

from localllm.errors import ModelNotFound
from localllm.hub.refs import PackageRef, SourceRef, parse_source

Checked = Literal["real weights", "random weights only", "not fetched here"]
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*:[a-z0-9][a-z0-9.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class KnownFile:
    """A file whose content is pinned: size in bytes and sha256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """One place a model can be had from.

    `parts`: packages that carry the chunks of a file too large for one package.
    `download_bytes` is exact when `exact`, else a rounded figure from the source's own page.
    """

    ref: SourceRef
    download_bytes: int | None = None
    exact: bool = False
    parts: tuple[PackageRef, ...] = ()
    files: tuple[KnownFile, ...] = ()


@dataclass(frozen=True)
class DefaultSampling:
    """What the model's makers recommend; None where they say nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True)
class CatalogEntry:
    """A model by its short name. `template` tells what is special about its chat template;
    `draft` names a smaller model of the same vocabulary."""

    name: str
    title: str
    parameters: int
    context: int
    licence: str
    vocabulary: str
    kind: Literal["chat", "base"]
    template: str
    checked: Checked
    sources: tuple[Source, ...]
    draft: str | None = None
    sampling: DefaultSampling = DefaultSampling()
    default: bool = False  # what the bare family name means
    config: Mapping[str, Any] | None = None  # the published config.json, as far as it tells sizes

    @property
    def family(self) -> str:
        return self.name.partition(":")[0]


class Catalog:
    """Entries by name, in the file's order; look-ups ignore case."""

    def __init__(self, entries: Mapping[str, CatalogEntry]) -> None:
        self._entries = dict(entries)
        self._defaults = {entry.family: entry for entry in entries.values() if entry.default}

    def __iter__(self) -> Iterator[CatalogEntry]:
        return iter(self._entries.values())

    def names(self) -> list[str]:
        return list(self._entries)

    def get(self, name: str) -> CatalogEntry | None:
        """The entry called `name`; a bare family means its default size."""
        key = name.lower()
        return self._entries.get(key) or self._defaults.get(key)


@cache
def load_catalog() -> Catalog:
    """The catalog that ships with the package."""
    return parse_catalog((files("localllm.models") / "catalog.toml").read_text("utf-8"))


def parse_catalog(text: str) -> Catalog:
    """Raises ValueError naming the entry and what is wrong with it."""
    entries = {}
    for name, table in tomllib.loads(text)["models"].items():
        try:
            entries[name] = _entry(name, table)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"catalog entry {name!r}: {error!r}") from error
    for entry in entries.values():
        if entry.draft is not None:
            draft = entries.get(entry.draft)
            if draft is None or draft.vocabulary != entry.vocabulary:
                raise ValueError(f"catalog entry {entry.name!r}: {entry.draft!r} cannot draft")
    for family in {entry.family for entry in entries.values()}:
        defaults = [e.name for e in entries.values() if e.family == family and e.default]
        if len(defaults) != 1:
            raise ValueError(f"family {family!r} needs one default size, has {defaults}")
    return Catalog(entries)


def _entry(name: str, table: Mapping[str, Any]) -> CatalogEntry:
    if not _NAME.fullmatch(name):
        raise ValueError("a name is family:size in lower case")
    values = dict(table)
    sources = tuple(_source(item) for item in values.pop("sources"))
    if not sources:
        raise ValueError("no sources")
    if values["checked"] not in get_args(Checked):
        raise ValueError(f"checked = {values['checked']!r}")
    if values["kind"] not in ("chat", "base"):
        raise ValueError(f"kind = {values['kind']!r}")
    sampling = DefaultSampling(**values.pop("sampling", {}))
    return CatalogEntry(name=name, sources=sources, sampling=sampling, **values)


def _source(table: Mapping[str, Any]) -> Source:
    unknown = table.keys() - {"from", "bytes", "about_bytes", "parts", "files"}
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    if "bytes" in table and "about_bytes" in table:
        raise ValueError("bytes is exact, about_bytes is not: give one")
    pinned = tuple(KnownFile(**item) for item in table.get("files", ()))
    for item in pinned:
        if not _SHA256.fullmatch(item.sha256):
            raise ValueError(f"{item.name}: not a sha256")
    return Source(
        ref=_ref(table["from"]),
        download_bytes=table.get("bytes", table.get("about_bytes")),
        exact="bytes" in table,
        parts=tuple(cast(PackageRef, _ref(part)) for part in table.get("parts", ())),
        files=pinned,
    )


def _ref(text: str) -> SourceRef:
    try:
        ref = parse_source(text)
    except ModelNotFound as error:
        raise ValueError(str(error)) from error
    if ref is None:
        raise ValueError(f"{text!r} is neither hf: nor pypi:")
    return ref
