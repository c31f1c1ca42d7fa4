"""The table of commands."""

from __future__ import annotations

import typer

app = typer.Typer(name="localllm", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def root() -> None:
    """Run, chat with and manage language models on this machine."""


def main() -> None:
    app()
