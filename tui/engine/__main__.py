"""`python -m localllm.tui.engine [FILE]`: the child. It speaks lines of JSON on stdin and stdout.
FILE is a descriptor of the page that it shares with the app."""

import contextlib
import os
import sys

from localllm.tui.engine.cores import Cores
from localllm.tui.engine.serve import main

NICER = 3  # than the app, whose few milliseconds a key must not wait for all cores' tokens

if __name__ == "__main__":
    with contextlib.suppress(OSError, AttributeError):
        os.nice(NICER)
    main(Cores(*map(int, sys.argv[1:])))
