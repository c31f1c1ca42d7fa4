"""The `localllm` command: one file a command, imported when called."""

from localllm.cli.entry import main

__all__ = ["main"]
