"""Lays the sources out as they are imported, for tools that read folders instead of importing.

    python scripts/source_tree.py .venv/source-tree

pyproject.toml maps top-level folders into the one namespace (`models/` is `localllm.models`). The
tree is made of symbolic links, so what mypy and import-linter report is a path into it.
"""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHES = (".mypy_cache", ".import_linter_cache")


def package_folders(root: Path = ROOT) -> dict[str, str]:
    """Import path -> source folder, as in pyproject: {"localllm/models": "models", …}."""
    pyproject = tomllib.loads((root / "pyproject.toml").read_text())
    return pyproject["tool"]["scikit-build"]["wheel"]["packages"]


def make_tree(place: str | Path, root: Path = ROOT) -> None:
    """Makes the tree at `place` anew; the tools' caches in it stay."""
    tree = Path(place)
    tree.mkdir(parents=True, exist_ok=True)
    for old in tree.iterdir():
        if old.is_dir() and not old.is_symlink():
            if old.name not in CACHES:
                shutil.rmtree(old)
        else:
            old.unlink()
    (tree / "pyproject.toml").symlink_to(root / "pyproject.toml")
    for package, folder in sorted(package_folders(root).items()):
        (tree / package).mkdir(parents=True)
        for entry in (root / folder).iterdir():
            if entry.name != "__pycache__":
                (tree / package / entry.name).symlink_to(entry)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make_tree(sys.argv[1])
