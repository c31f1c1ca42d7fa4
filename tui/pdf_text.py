"""`python -m localllm.tui.pdf_text FILE`: the text of a PDF, on stdout as UTF-8.

A process of its own: a file made to exhaust time or memory ends this and nothing else.
"""

from __future__ import annotations

import contextlib
import sys

MOST_PAGES = 2000
MOST_CHARACTERS = 2_000_000
_MEMORY = 2 << 30  # bytes of address space
_SECONDS = 60  # of processor time
# Exit codes, beside what Python itself gives.
NO_PYPDF, ENCRYPTED, DAMAGED, TOO_LONG = 10, 11, 12, 13


def main(path: str) -> int:
    _limit()
    try:
        import logging

        import pypdf
    except ImportError:
        return NO_PYPDF
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it is told by the exit code
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            return ENCRYPTED
        if len(reader.pages) > MOST_PAGES:
            return TOO_LONG
        pages = []
        left = MOST_CHARACTERS
        for page in reader.pages:
            text = page.extract_text().strip()
            left -= len(text)
            if left < 0:
                return TOO_LONG
            pages.append(text)
    except Exception as error:  # a damaged file may raise anything
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return DAMAGED
    text = "\n\n".join(page for page in pages if page)
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    return 0


def _limit() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 5))
        if sys.platform == "linux":  # elsewhere address space says little about memory
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
