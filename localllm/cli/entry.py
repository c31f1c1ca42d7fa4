"""The command's beginning, and how errors leave the program."""

from __future__ import annotations

import os
import sys

from localllm.cli.at_once import opening
from localllm.errors import LocalLLMError


def main() -> None:
    """Exit codes: 0 success, 1 failure, 2 bad usage, 130 interrupted."""
    try:
        arguments = sys.argv[1:]
        if (chat := opening(arguments)) is not None:
            from localllm.tui.start import start

            start(chat)
        else:
            from localllm.cli.app import program

            program(arguments)()
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
