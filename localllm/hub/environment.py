"""Switches in the environment, read when asked for, not when imported."""

from __future__ import annotations

import os


def is_set(variable: str) -> bool:
    """Anything but empty, 0, false, no and off."""
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")


def hub_endpoint() -> str | None:
    """HF_ENDPOINT, or None for the client's own default."""
    return os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or None
