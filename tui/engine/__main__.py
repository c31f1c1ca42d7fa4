"""`python -m localllm.tui.engine`: the child. It speaks lines of JSON on stdin and stdout."""

from localllm.tui.engine.serve import main

if __name__ == "__main__":
    main()
