"""Where the app keeps things: its settings, and the chats."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CHATS = "chats.db"
SETTINGS = "settings.toml"
KEYS = "keys.toml"


def config_folder() -> Path:
    """LOCALLLM_HOME/config, else the platform's folder for settings."""
    return _folder("config", "XDG_CONFIG_HOME", ".config")


def data_folder() -> Path:
    """LOCALLLM_HOME/chats, else the platform's folder for what programs keep. Not the cache, where
    models are: chats cannot be fetched again."""
    return _folder("chats", "XDG_DATA_HOME", ".local/share")


def database() -> Path:
    return data_folder() / CHATS


def _folder(below_home: str, variable: str, fallback: str) -> Path:
    if home := os.environ.get("LOCALLLM_HOME"):
        return Path(home).expanduser().absolute() / below_home
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "localllm"
    told = os.environ.get(variable, "")
    # The XDG specification asks to ignore relative paths.
    base = Path(told) if told.startswith("/") else Path.home() / fallback
    return base / "localllm"
