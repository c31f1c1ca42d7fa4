"""The folders map into one namespace, and imports point one way."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PYPROJECT["tool"]["scikit-build"]["wheel"]["packages"]


def python(program: str, folder: Path) -> str:
    """What `program` prints, run by a new interpreter outside the clone."""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


@pytest.mark.parametrize(("package", "folder"), FOLDERS.items())
def test_a_mapped_folder_is_imported_by_its_place_in_the_namespace(
    package: str, folder: str, tmp_path: Path
) -> None:
    name = package.replace("/", ".")
    found = python(
        f"from importlib.util import find_spec; print(find_spec({name!r}).name)", tmp_path
    )
    assert found == name
    assert (ROOT / folder / "__init__.py").is_file()


def test_every_package_at_the_root_is_mapped() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} == set(FOLDERS.values())


@pytest.mark.parametrize("name", [folder for folder in FOLDERS.values() if folder != "localllm"])
def test_no_folder_is_importable_at_top_level(name: str, tmp_path: Path) -> None:
    found = python(f"from importlib.util import find_spec; print(find_spec({name!r}))", tmp_path)
    assert found == "None"


def test_every_folder_with_modules_is_a_package() -> None:
    # A folder without __init__.py still imports, but mypy and import-linter pass it by.
    for folder in FOLDERS.values():
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), module.relative_to(ROOT)


def test_every_folder_of_tests_is_a_package() -> None:
    # Modules of the same name in two folders need it.
    for module in (ROOT / "tests").rglob("test_*.py"):
        assert (module.parent / "__init__.py").is_file(), module.relative_to(ROOT)


def lint_imports(clone: Path, tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(clone / "scripts" / "lint_imports.py"), str(tree)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_point_one_way(tmp_path: Path) -> None:
    run = lint_imports(ROOT, tmp_path / "tree")
    assert run.returncode == 0, run.stdout + run.stderr


def test_an_import_that_points_the_wrong_way_is_found(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / "scripts").mkdir(parents=True)
    for name in ("source_tree.py", "lint_imports.py"):
        (clone / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (clone / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    for folder in FOLDERS.values():
        if folder != "localllm":
            (clone / folder).symlink_to(ROOT / folder)
    (clone / "localllm").mkdir()
    for entry in (ROOT / "localllm").iterdir():
        if entry.name != "errors.py":
            (clone / "localllm" / entry.name).symlink_to(entry)
    errors = (ROOT / "localllm" / "errors.py").read_text()
    (clone / "localllm" / "errors.py").write_text(errors + "\nimport localllm.engine\n")

    run = lint_imports(clone, tmp_path / "tree")
    assert run.returncode == 1
    assert "localllm.errors -> localllm.engine" in run.stdout
