"""Checks of single values; an error names the field, what it may be and what it was."""

from __future__ import annotations

import math
from numbers import Integral, Real

from localllm.errors import InvalidRequest


def whole(name: str, value: object, low: int, high: int | None) -> None:
    ok = isinstance(value, Integral) and not isinstance(value, bool)
    if not ok or value < low or (high is not None and value > high):  # type: ignore[operator]
        upper = "" if high is None else f" and at most {high}"
        raise InvalidRequest(f"{name} must be a whole number, at least {low}{upper}, not {value!r}")


def number(
    name: str, value: object, low: float | None, high: float | None, *, open_low: bool = False
) -> None:
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        given = float(value)
        above = low is None or given > low or (given == low and not open_low)
        if above and (high is None or given <= high):
            return
    bounds = []
    if low is not None:
        bounds.append(f"{'above' if open_low else 'at least'} {low:g}")
    if high is not None:
        bounds.append(f"at most {high:g}")
    limits = f" {' and '.join(bounds)}" if bounds else ""
    raise InvalidRequest(f"{name} must be a finite number{limits}, not {value!r}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, not {value!r}")


def text(name: str, value: object, longest: int) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{name} must be non-empty text, not {value!r:.80}")
    if len(value) > longest:
        raise InvalidRequest(f"{name} has {len(value)} characters; at most {longest} are taken")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} is no Unicode text: {error}") from error
