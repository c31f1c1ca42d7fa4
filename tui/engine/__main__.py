"""`python -m localllm.tui.engine`: the child. It speaks lines of JSON on stdin and stdout."""

import contextlib
import os

from localllm.tui.engine.serve import main

NICER = 3  # than the app, whose few milliseconds a key must not wait for all cores' tokens

if __name__ == "__main__":
    with contextlib.suppress(OSError, AttributeError):
        os.nice(NICER)
    main()
