"""The hub's protocol, through huggingface_hub: listing, metadata, resumable downloads.

`hf_hub_download` starts a file over when its process died; here the unfinished file is kept and
`http_get` asks for the rest. Everything else (tokens, retries, redirects) is the library's.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.file_download import http_get

from localllm.errors import DownloadError
from localllm.hub.disk import require_space, telling_os_errors
from localllm.hub.environment import hub_endpoint
from localllm.hub.hub_errors import BrokenOffError, telling_hub_errors
from localllm.hub.manifest import StoredFile
from localllm.hub.progress import Progress, human_bytes
from localllm.hub.refs import HubRef
from localllm.hub.store import hash_file

_TIMEOUT = 30.0  # seconds the hub may take to answer a question
_TRIES = 3  # times a download may break off without one byte more, before it is given up
_PAUSE = 1.0  # seconds before the next try

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Listing:
    """The files of one commit. `names` are paths inside the repository."""

    commit: str
    names: tuple[str, ...]
    licence: str | None


@dataclass(frozen=True)
class RemoteFile:
    """`sha256` in hex is told for large files (LFS), None for the small ones kept in git."""

    name: str
    size: int
    sha256: str | None


class HubClient:
    """One repository at one revision, on the hub that HF_ENDPOINT names now."""

    def __init__(self, ref: HubRef, progress: Progress) -> None:
        self._ref, self._progress = ref, progress
        self._endpoint = hub_endpoint()
        self._revision = ref.revision or "main"
        self._known: dict[str, RemoteFile] = {}

    def listing(self) -> Listing:
        """Raises ModelNotFound or DownloadError."""
        with telling_hub_errors(self._ref):
            info = HfApi(endpoint=self._endpoint, library_name="localllm").model_info(
                self._ref.repo, revision=self._revision, files_metadata=True, timeout=_TIMEOUT
            )
        for file in info.siblings or ():
            sha256 = file.lfs.sha256 if file.lfs else None
            weights = file.rfilename.endswith((".safetensors", ".gguf"))
            if file.size is not None and (sha256 or not weights):
                self._known[file.rfilename] = RemoteFile(file.rfilename, file.size, sha256)
        if info.sha and re.fullmatch(r"[0-9a-f]{40,64}", info.sha):
            self._revision = info.sha  # all files from one commit, whatever is pushed meanwhile
        names = tuple(file.rfilename for file in info.siblings or ())
        return Listing(self._revision, names, _licence(info))

    def describe(self, name: str) -> RemoteFile:
        """Size and sha256 of a file, asked for if the listing did not tell them."""
        if name not in self._known:
            with telling_hub_errors(self._ref, name):
                about = get_hf_file_metadata(
                    self._url(name), timeout=_TIMEOUT, endpoint=self._endpoint
                )
            if about.size is None:
                raise DownloadError(f"{self._ref}: the hub does not tell the size of {name}")
            sha256 = about.etag if _SHA256.fullmatch(about.etag or "") else None
            self._known[name] = RemoteFile(name, about.size, sha256)
        return self._known[name]

    def download(
        self, file: RemoteFile, target: Path, incomplete: Path, update: Callable[[int], None]
    ) -> StoredFile:
        """Fetch `file` to `target`, going on from what `incomplete` holds of it.

        A finished target is used again if its content is right. Raises DownloadError, StoreError.
        """
        if not target.exists() or target.stat().st_size != file.size:
            part = incomplete / hashlib.sha256(f"{file.name} {file.sha256}".encode()).hexdigest()
            self._complete(file, part, update)
            with telling_os_errors(target):
                part.replace(target)
        sha256 = hash_file(target)
        if file.sha256 not in (None, sha256):
            target.unlink(missing_ok=True)
            raise DownloadError(
                f"{self._ref}: {file.name} arrived damaged: its sha256 is {sha256}, "
                f"not {file.sha256}",
                hint="pull again; if it stays so, a proxy or mirror between is at fault",
            )
        return StoredFile(target.name, file.size, sha256)

    def _complete(self, file: RemoteFile, part: Path, update: Callable[[int], None]) -> None:
        tries = 0
        while True:
            have = _prepare(part, file.size)
            if have == file.size:
                update(have)
                return
            require_space(file.size - have, part.parent)
            try:
                with telling_hub_errors(self._ref, file.name, into=part.parent):
                    self._get(file, part, have, update)
            except BrokenOffError as error:
                tries = tries + 1 if _size(part) <= have else 0
                if tries >= _TRIES:
                    raise DownloadError(
                        f"{self._ref}: the download of {file.name} broke off at "
                        f"{human_bytes(_size(part))} of {human_bytes(file.size)}: {error}",
                        hint="pull again to go on from there",
                    ) from error
                self._progress.say(f"connection lost while downloading {file.name}; going on")
                time.sleep(_PAUSE)

    def _get(self, file: RemoteFile, part: Path, have: int, update: Callable[[int], None]) -> None:
        token = get_token()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        with _Meter(part, file.size, update) as out, _warnings_to(self._progress, file.name):
            out.seek(have)
            http_get(
                self._url(file.name),
                out,
                resume_size=have,
                headers=headers,
                expected_size=file.size,
                tqdm_class=cast(Any, _NoBar),
            )
            out.flush()
            os.fsync(out.fileno())

    def _url(self, name: str) -> str:
        return hf_hub_url(self._ref.repo, name, revision=self._revision, endpoint=self._endpoint)


class _NoBar:
    """Stands in for the library's progress bar: we draw our own."""

    def __init__(self, **_: Any) -> None:
        pass

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        pass


class _Meter(io.BufferedRandom):
    """A file that reports its position and takes no more than was promised."""

    def __init__(self, path: Path, limit: int, update: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "r+b"))
        self._limit, self._update = limit, update

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self._limit:
            raise DownloadError(f"the hub sends more than the {self._limit} bytes it stated")
        written = super().write(data)
        self._update(self.tell())
        return written


def _prepare(part: Path, size: int) -> int:
    """Make sure `part` exists and is no longer than `size`; returns its length."""
    with telling_os_errors(part):
        part.touch()
        if part.stat().st_size > size:
            os.truncate(part, 0)
        return part.stat().st_size


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _licence(info: Any) -> str | None:
    licence = getattr(info.card_data, "license", None)
    if isinstance(licence, str):
        return licence
    tags = (tag for tag in info.tags or () if tag.startswith("license:"))
    return next(tags, "").removeprefix("license:") or None


@contextmanager
def _warnings_to(progress: Progress, name: str) -> Iterator[None]:
    """Say the library's "trying to resume" warnings in our words, beside our own bar."""

    def retell(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        progress.say(f"connection lost while downloading {name}; going on")
        return False

    logger = logging.getLogger("huggingface_hub.file_download")
    logger.addFilter(retell)
    try:
        yield
    finally:
        logger.removeFilter(retell)
