"""`@path` in a message: the file's text goes along with it.

A path with spaces is quoted, @"my notes.txt", or has its spaces escaped. `\\@` is a plain @.
"""

from __future__ import annotations

import asyncio
import codecs
import re
import stat
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from localllm.errors import InvalidRequest
from localllm.tui import pdf_text
from localllm.tui.engine.client import Engine
from localllm.tui.text import one_line

MOST_BYTES = 2 << 20  # of a text
MOST_PDF_BYTES = 64 << 20
MOST_FILES = 32  # of a message
_PDF_SECONDS = 90.0
_ODD_SHARE = 0.01  # of control characters in what is still taken for text in an old encoding

_MENTION = re.compile(
    r"""(?P<escaped>\\@)
      | (?<![^\s(\[{,;:'"])@(?: "(?P<double>[^"\n]+)"
                              | '(?P<single>[^'\n]+)'
                              | (?P<bare>(?:\\.|[^\s"'\\@])(?:\\.|[^\s\\])*) )""",
    re.VERBOSE,
)
_AFTER = ".,;:!?)]}'\""  # may follow a path in a sentence
_EXPLICIT = re.compile(
    r"""^(?:\.{0,2}/|~)|\.(?:txt|md|rst|log|csv|tsv|json|jsonl|toml|ya?ml|ini|cfg|xml|html?|css|pdf
        |tex|py|ipynb|js|jsx|ts|tsx|c|h|cc|cpp|hpp|rs|go|java|kt|swift|rb|php|sh|sql|r|docx?)$""",
    re.VERBOSE | re.IGNORECASE,
)  # can hardly be a name
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, which begins the same
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_KINDS = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"RIFF", "a picture or a sound"),
    (b"PK\x03\x04", "a ZIP archive or an Office document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"GGUF", "a model"),
    (b"SQLite format 3", "a database"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"OggS", "a sound"),
    (b"ID3", "a sound"),
    (b"fLaC", "a sound"),
)
# What follows ``` so that code is coloured as such, where it is not the ending itself.
_LANGUAGES = {
    "py": "python", "js": "javascript", "ts": "typescript", "rs": "rust", "rb": "ruby",
    "sh": "bash", "yml": "yaml", "md": "markdown", "h": "c", "hpp": "cpp", "cc": "cpp",
    "kt": "kotlin", "cs": "csharp", "txt": "", "log": "", "pdf": "", "text": "",
}  # fmt: skip


@dataclass(frozen=True)
class Mention:
    """A path in a message, text[start:end]."""

    start: int
    end: int
    path: str


@dataclass(frozen=True)
class Attachment:
    """A file that was read. encoding: "pdf" for one whose text was taken out. nbytes: of the file.

    fenced: as it stands in the message.
    """

    path: Path
    name: str
    text: str
    encoding: str
    nbytes: int

    @property
    def fenced(self) -> str:
        """Its name, and its text in a fence that nothing in it can end."""
        longest = max((len(run) for run in re.findall(r"`+", self.text)), default=0)
        fence = "`" * max(3, longest + 1)
        ending = self.path.suffix[1:].lower()
        language = _LANGUAGES.get(ending, ending if ending.isalnum() else "")
        end = "" if self.text.endswith("\n") else "\n"
        return f"File `{one_line(self.name)}`:\n{fence}{language}\n{self.text}{end}{fence}"


@dataclass(frozen=True)
class Attached:
    """content: what is said, the files after it. typed: how much of it is the person's own."""

    content: str
    typed: int
    files: tuple[Attachment, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def extra(self) -> dict[str, object]:
        """For the message's `extra` in the store; empty where there are no files."""
        if not self.files:
            return {}
        told = [{"name": f.name, "path": str(f.path), "bytes": f.nbytes} for f in self.files]
        return {"attachments": told, "typed": self.typed}


def mentions(text: str, folder: Path) -> list[Mention]:
    """The files that a message names, relative ones in `folder`. Looks whether they are there.

    @name that is no file stays text, such as a person's. Raises InvalidRequest for what is quoted
    or written like a path and is not there.
    """
    found = []
    for match in _MENTION.finditer(text):
        quoted = match["double"] or match["single"]
        if match["escaped"]:
            continue
        if quoted is not None:
            _must_exist(quoted, folder)
            found.append(Mention(match.start(), match.end(), quoted))
            continue
        bare, end = match["bare"], match.end()
        path = _unescaped(bare)
        while not _exists(path, folder) and bare and bare[-1] in _AFTER:
            bare, end = bare[:-1], end - 1
            path = _unescaped(bare)
        if bare and _exists(path, folder):
            found.append(Mention(match.start(), end, path))
        elif _EXPLICIT.search(path):
            _must_exist(path, folder)
    return found


async def attach(text: str, folder: Path | None = None) -> Attached:
    """The message with the files that it names. folder: for relative paths; None: the current one.

    Raises InvalidRequest, which says which file cannot go along, and why.
    """
    return await asyncio.to_thread(attach_now, text, folder or Path.cwd())


def attach_now(text: str, folder: Path) -> Attached:
    """As `attach`, waiting for the files."""
    paths = list(dict.fromkeys(_resolved(one.path, folder) for one in mentions(text, folder)))
    if len(paths) > MOST_FILES:
        raise InvalidRequest(f"{len(paths)} files are named; {MOST_FILES} can go along at most")
    files = tuple(map(read_attachment, paths))
    typed = text.replace("\\@", "@")
    content = "\n\n".join([typed, *(one.fenced for one in files)])
    return Attached(content, len(typed), files)


async def token_costs(engine: Engine, files: Iterable[Attachment]) -> list[int]:
    """Tokens that each of them takes in a message."""
    return [await engine.tokens(one.fenced) for one in files]


def read_attachment(path: Path) -> Attachment:
    """Raises InvalidRequest for what is no file, cannot be read, is too large or is no text."""
    try:
        facts = path.stat()
        if stat.S_ISDIR(facts.st_mode):
            raise InvalidRequest(f"{path} is a folder", hint="name the files in it one by one")
        if not stat.S_ISREG(facts.st_mode):
            raise InvalidRequest(f"{path} is no ordinary file")
        with path.open("rb") as file:
            begin = file.read(1024)
            is_pdf = b"%PDF-" in begin
            most = MOST_PDF_BYTES if is_pdf else MOST_BYTES
            if facts.st_size > most:
                raise InvalidRequest(
                    f"{path} has {facts.st_size:,} bytes; {most:,} can be attached at most",
                    hint="cut out the part that matters",
                )
            data = b"" if is_pdf else begin + file.read(most + 1 - len(begin))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror or error}") from error
    if is_pdf:
        return Attachment(path, path.name, _pdf(path), "pdf", facts.st_size)
    if len(data) > most:
        raise InvalidRequest(f"{path} is growing; attach it when it is done")
    text, encoding = decode(data, path)
    return Attachment(path, path.name, text, encoding, len(data))


def decode(data: bytes, path: Path) -> tuple[str, str]:
    """A file's text, line ends as \\n, and its encoding. Raises InvalidRequest for what is none."""
    text, encoding = _decoded(data, path)
    return text.replace("\r\n", "\n").replace("\r", "\n"), encoding


def _decoded(data: bytes, path: Path) -> tuple[str, str]:
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            try:
                return data.decode(encoding), encoding
            except UnicodeDecodeError as error:
                raise InvalidRequest(f"{path} is damaged {encoding} text: {error}") from error
    for begin, kind in _KINDS:
        if data.startswith(begin) and (b"\0" in data[:4096] or not data[:64].isascii()):
            raise InvalidRequest(f"{path} is {kind}, no text", hint="attach text, code or a PDF")
    unmarked = _utf16_by_zeros(data)
    if unmarked is not None:
        with suppress(UnicodeDecodeError):
            return data.decode(unmarked), unmarked
    if b"\0" in data:
        raise InvalidRequest(f"{path} is binary, no text", hint="attach text, code or a PDF")
    with suppress(UnicodeDecodeError):
        return data.decode("utf-8"), "utf-8"
    odd = sum(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in data)
    if odd > _ODD_SHARE * len(data):
        raise InvalidRequest(f"{path} is binary, no text", hint="attach text, code or a PDF")
    try:
        return data.decode("cp1252"), "cp1252"
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"


def _utf16_by_zeros(data: bytes) -> str | None:
    """UTF-16 without a mark shows by zeros in every other byte."""
    sample = data[:4096]
    half = len(sample) // 2
    if half < 4 or len(data) % 2:
        return None
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    if odd > 0.7 * half and even == 0:
        return "utf-16-le"
    return "utf-16-be" if even > 0.7 * half and odd == 0 else None


def _pdf(path: Path) -> str:
    command = [sys.executable, "-m", "localllm.tui.pdf_text", str(path)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PDF_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidRequest(f"reading {path} takes too long") from error
    why = {
        pdf_text.ENCRYPTED: "is encrypted",
        pdf_text.TOO_LONG: f"has more than {pdf_text.MOST_PAGES:,} pages or "
        f"{pdf_text.MOST_CHARACTERS:,} characters",
    }
    if done.returncode == pdf_text.NO_PYPDF:
        raise InvalidRequest(
            "reading PDF files needs the package pypdf",
            hint="pip install 'localllm[pdf]'",
        )
    if done.returncode in why:
        raise InvalidRequest(f"{path} {why[done.returncode]}")
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        reason = one_line(words[-1], 200) if words else f"exit code {done.returncode}"
        raise InvalidRequest(f"{path} is damaged, or too much for its reader: {reason}")
    text = done.stdout.decode("utf-8", "replace")
    if not text.strip():
        raise InvalidRequest(f"{path} holds no text; it may be made of pictures of pages")
    return text


def _must_exist(path: str, folder: Path) -> None:
    if not _exists(path, folder):
        whole = _resolved(path, folder)
        what = f"{whole} is a folder" if whole.is_dir() else f"there is no file {whole}"
        raise InvalidRequest(what, hint="write \\@ for a plain @")


def _exists(path: str, folder: Path) -> bool:
    try:
        return bool(path) and _resolved(path, folder).is_file()
    except (OSError, ValueError):  # a name too long, or with a zero in it
        return False


def _resolved(path: str, folder: Path) -> Path:
    try:
        return folder / Path(path).expanduser()
    except RuntimeError:  # no home of that name
        return folder / path


def _unescaped(path: str) -> str:
    return re.sub(r"\\(.)", r"\1", path)
