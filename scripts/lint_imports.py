"""Runs import-linter over the tree that source_tree.py lays out: scripts/lint_imports.py TREE."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder

from importlinter.cli import lint_imports
from source_tree import make_tree


def main(tree: str) -> int:
    make_tree(tree)
    # An editable install answers for `localllm` before any path is searched, and its folders hold
    # the tests and benchmarks too. The plain finder goes first, so that the tree is what is read.
    sys.meta_path.insert(0, PathFinder)
    os.chdir(tree)
    return lint_imports(cache_dir=".import_linter_cache", no_logo=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
