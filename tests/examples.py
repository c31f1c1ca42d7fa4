"""How many examples a costly property is tried on."""

from __future__ import annotations

QUICK = 0.2
share = 1.0  # QUICK in `make test`; set by tests/conftest.py before it imports any test


def examples(count: int) -> int:
    """`count` of them in `make test-all`, a fifth in `make test`, whose time is short."""
    return max(3, round(count * share))
