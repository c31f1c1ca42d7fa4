"""`localllm rm`: remove a model from the store."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def rm(
    name: Annotated[str, typer.Argument(help="The name that `localllm list` shows.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model and free its disk space, that of its packed weights included."""
    from localllm import hub
    from localllm.backend.packed_folder import PackedFolder
    from localllm.hub.progress import human_bytes
    from localllm.hub.store import Store

    size = hub.size_on_disk(name)
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Remove {name} ({human_bytes(size)})?", abort=True)
    freed = hub.remove(name) + PackedFolder(Store().packed).forget_removed()
    typer.echo(f"removed {name}, {human_bytes(freed)} freed")
