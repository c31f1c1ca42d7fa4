"""The table of commands, and how errors leave the program."""

from __future__ import annotations

import os
import sys

import typer

from localllm.cli.batch import batch
from localllm.cli.bench import bench
from localllm.cli.chat import chat
from localllm.cli.doctor import doctor
from localllm.cli.evaluate import evaluate
from localllm.cli.export import export
from localllm.cli.finetune import finetune
from localllm.cli.fuse import fuse
from localllm.cli.list_models import list_models
from localllm.cli.plan import plan
from localllm.cli.pull import pull
from localllm.cli.rm import rm
from localllm.cli.run import run
from localllm.cli.runs import runs
from localllm.cli.show import show
from localllm.errors import LocalLLMError

app = typer.Typer(
    name="localllm",
    help="Run, chat with and manage language models on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help needs no rich, and starts three times faster
    pretty_exceptions_enable=False,
)

# The commands' modules are light: what a command needs is imported when it is called.
app.command()(run)
app.command()(chat)
app.command()(batch)
app.command()(pull)
app.command(name="list")(list_models)
app.command()(show)
app.command()(plan)
app.command()(finetune)
app.add_typer(runs, name="runs")
app.command()(evaluate)
app.command()(fuse)
app.command()(export)
app.command()(rm)
app.command()(doctor)
app.command()(bench)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from localllm import __version__

        typer.echo(f"localllm {__version__}")
        raise typer.Exit


def main() -> None:
    """Exit codes: 0 success, 1 failure, 2 bad usage, 130 interrupted."""
    try:
        app()
    except LocalLLMError as error:
        print(f"localllm: {error}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`localllm list | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
