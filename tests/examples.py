"""How much of a costly proof `make test` tries; `make test-all` tries all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

QUICK = 0.2
share = 1.0  # QUICK in `make test`; set by tests/conftest.py before it imports any test


def examples(count: int) -> int:
    """So many of hypothesis's examples, a fifth of them in `make test`."""
    return max(3, round(count * share))


def some(cases: Iterable[Any], every: int, name: Callable[[Any], str] = str) -> list[Any]:
    """Cases for `parametrize`, of which all but the first of each `every` are slow."""
    return [
        pytest.param(case, id=name(case), marks=pytest.mark.slow if number % every else ())
        for number, case in enumerate(cases)
    ]
