"""Sizes as people write them: 32k positions, 16GB."""

from __future__ import annotations

import re

import typer

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([km]?)", re.IGNORECASE)
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)


def parse_count(text: str) -> int:
    """Positions: 8192, or 32k and 1m in powers of 1,024, as contexts are named.

    Raises typer.BadParameter for what is no size.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no number of positions; write 8192, 32k or 1m")
    return _whole(text, float(match[1]) * 1024 ** " km".index(match[2].lower() or " "))


def parse_bytes(text: str) -> int:
    """Bytes: 500MB and 16GB in powers of 1,000, 16GiB in powers of 1,024.

    Raises typer.BadParameter for what is no size.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size; write 500MB, 16GB or 16GiB")
    base = 1024 if match[3] else 1000
    return _whole(text, float(match[1]) * base ** " kmgt".index((match[2] or " ").lower()))


def _whole(text: str, value: float) -> int:
    if not 1 <= value < 1 << 53:
        raise typer.BadParameter(f"{text!r} is out of range")
    return round(value)
