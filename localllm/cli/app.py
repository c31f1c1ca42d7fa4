"""The table of commands."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import typer

from localllm.cli.quick import QuickCommand, QuickGroup

# A command's name, and the module of localllm.cli with a function (or a Typer) of that module's
# name.
COMMANDS = {
    "run": "run",
    "chat": "chat",
    "batch": "batch",
    "pull": "pull",
    "list": "list_models",
    "show": "show",
    "plan": "plan",
    "finetune": "finetune",
    "runs": "runs",
    "evaluate": "evaluate",
    "fuse": "fuse",
    "export": "export",
    "rm": "rm",
    "doctor": "doctor",
    "bench": "bench",
}


def program(arguments: Sequence[str] = ()) -> typer.Typer:
    """With the command that the arguments begin with; where they begin with none, with all.

    A command takes some milliseconds to make, so that the others are left out.
    """
    made = typer.Typer(
        name="localllm",
        help="Run, chat with and manage language models on this machine.",
        cls=QuickGroup,
        invoke_without_command=True,
        no_args_is_help=True,
        rich_markup_mode=None,  # plain help needs no rich, and starts three times faster
        pretty_exceptions_enable=False,
    )
    made.callback()(root)
    wanted = [name for name in COMMANDS if name in arguments[:1]] or list(COMMANDS)
    for name in wanted:
        module = COMMANDS[name]
        command = getattr(import_module(f"localllm.cli.{module}"), module)
        if isinstance(command, typer.Typer):
            made.add_typer(command, name=name)
        else:
            made.command(name=name, cls=QuickCommand)(command)
    return made


def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from localllm import __version__

        typer.echo(f"localllm {__version__}")
        raise typer.Exit
