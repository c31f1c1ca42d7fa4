"""What an installed localllm is made of: built as a user's `pip install` builds it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("localllm-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(sdist))
    (file,) = folder.glob("localllm-*.whl")
    return file


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def pip(*arguments: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_source_distribution_holds_all_that_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    assert {"pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"} <= held
    sources = [*(ROOT / "kernels_cpu").rglob("*.cpp"), *(ROOT / "kernels_cpu").rglob("*.h")]
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= held


def test_only_localllm_is_installed_at_top_level(names: list[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"localllm"}


def test_every_module_is_in_the_wheel(names: list[str]) -> None:
    for folder, package in (
        ("localllm", ""),
        ("models", "models/"),
        ("kernels_metal", "kernels_metal/"),
        ("tui", "tui/"),
    ):
        for module in (ROOT / folder).rglob("*.py"):
            place = f"localllm/{package}{module.relative_to(ROOT / folder).as_posix()}"
            assert place in names


def test_data_files_are_in_the_wheel(names: list[str]) -> None:
    assert "localllm/models/catalog.toml" in names
    assert "localllm/py.typed" in names
    assert any(name.startswith("localllm/kernels_cpu/_native.") for name in names)


def test_the_emulator_has_the_sources_it_compiles(names: list[str]) -> None:
    folder = ROOT / "kernels_metal"
    kinds = ("emulator/runtime/*", "emulator/shim/**/*", "*.metal")
    for source in (path for kind in kinds for path in folder.glob(kind) if path.is_file()):
        assert f"localllm/kernels_metal/{source.relative_to(folder).as_posix()}" in names


def test_neither_sources_of_the_native_module_nor_tests_are_in_the_wheel(names: list[str]) -> None:
    native = [name for name in names if not name.startswith("localllm/kernels_metal/emulator/")]
    assert not {Path(name).suffix for name in native} & {".cpp", ".h", ".hpp"}
    assert not {Path(name).suffix for name in names} & {".o", ".a"}
    assert not [name for name in names if "CMakeLists" in name or "test" in Path(name).name]


def test_the_wheel_works_without_the_clone(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "--no-deps", "--target", str(site), str(wheel))
    # The plain finder goes before the hook of an editable install, which may be there too.
    program = f"""
import sys
from importlib.machinery import PathFinder
sys.meta_path.insert(0, PathFinder)
sys.path.insert(0, {str(site)!r})
import localllm
assert localllm.__file__.startswith({str(site)!r}), localllm.__file__
from localllm.hub import load_catalog
from localllm.kernels_cpu._native import cpu_features
assert "smollm2:135m" in load_catalog().names()
assert isinstance(cpu_features(), list)
sys.argv = ["localllm", "--version"]
from localllm.cli import main
main()
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("localllm ")
