"""Setting up: the right Python is found, what is missing is named, nothing is done twice."""

from __future__ import annotations

import importlib.util
import os
import pty
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHELL = "/bin/sh"


@pytest.fixture(scope="module")
def environment() -> ModuleType:
    """scripts/environment.py as a module."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "scripts/environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{SHELL}\n{text}\n")
    path.chmod(0o755)
    return path


def find_python(path: Path, python: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SHELL, str(ROOT / "scripts/find-python")],
        cwd=path,
        env={"PATH": str(path), "PYTHON": python},
        capture_output=True,
        text=True,
        check=False,
    )


def old_and_new_pythons(folder: Path, **exit_codes: int) -> Path:
    """Stand-ins that answer whether they are new enough, as the script asks them."""
    folder.mkdir(exist_ok=True)
    (folder / "cat").symlink_to(shutil.which("cat") or "/bin/cat")
    for name, code in exit_codes.items():
        program(folder / name.replace("_", "."), f"exit {code}")
    return folder


def test_the_first_python_that_is_new_enough_is_taken(tmp_path: Path) -> None:
    found = find_python(old_and_new_pythons(tmp_path, python3=1, python3_11=0, python3_12=0))
    assert (found.returncode, found.stdout) == (0, "python3.12\n")


def test_plain_python3_is_preferred(tmp_path: Path) -> None:
    found = find_python(old_and_new_pythons(tmp_path, python3=0, python3_13=0))
    assert found.stdout == "python3\n"


def test_an_environment_keeps_the_python_it_was_made_with(tmp_path: Path) -> None:
    path = old_and_new_pythons(tmp_path, python3=0, first=0)
    program(tmp_path / ".venv/bin/python", f"echo {tmp_path}/first")
    assert find_python(path).stdout == f"{tmp_path}/first\n"


def test_without_a_new_python_the_message_says_how_to_get_one(tmp_path: Path) -> None:
    found = find_python(old_and_new_pythons(tmp_path, python3=1))
    assert found.returncode == 1
    assert "needs Python 3.11 or newer" in found.stderr
    assert "sudo apt install python3" in found.stderr


def test_a_named_python_is_used_and_no_other(tmp_path: Path) -> None:
    path = old_and_new_pythons(tmp_path, python3=0, mine=0, ancient=1)
    assert find_python(path, python="mine").stdout == "mine\n"
    refused = find_python(path, python="ancient")
    assert refused.returncode == 1
    assert "PYTHON=ancient" in refused.stderr


def test_the_running_python_is_new_enough(tmp_path: Path) -> None:
    assert find_python(tmp_path, python=sys.executable).stdout.strip() == sys.executable


def test_a_missing_compiler_is_named_with_the_way_to_get_one(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(environment.SetupError, match="sudo apt install g\\+\\+"):
        environment.check_compiler()


def test_a_compiler_that_does_not_work_is_shown_with_its_words(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = program(tmp_path / "broken", "echo 'cannot find vector' >&2; exit 1")
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(environment.SetupError, match="cannot find vector"):
        environment.check_compiler()


def test_the_compiler_that_was_checked_is_the_one_that_builds(
    environment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "clang++", "exit 0")
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    environment.check_compiler()
    assert os.environ["CXX"] == "clang++"


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_which_package_has_it(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == module else object())
    with pytest.raises(environment.SetupError, match=f"`{module}` is missing(.|\n)*-venv"):
        environment.check_python()


def test_a_python_without_headers_is_told_which_package_has_them(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(environment.SetupError, match=r"python3\.\d+-dev"):
        environment.check_python()


@pytest.mark.parametrize(
    ("log", "hint"),
    [
        (
            "WARNING: Retrying after connection broken by 'ReadTimeoutError(…)'\n"
            + "Collecting\n" * 50
            + "ERROR: something else",
            "the whole log is in",
        ),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(…)'\n"
            "ERROR: No matching distribution found for numpy",
            "registry could not be reached",
        ),
        (
            "CMake Error: localllm builds its CPU engine from C++ and found no compiler.",
            "apt install g++",
        ),
        ("ERROR: No matching distribution found for mlx", "Try another Python"),
        ("ERROR: something else", "the whole log is in"),
    ],
)
def test_a_failed_installation_ends_with_the_way_out(
    environment: ModuleType, log: str, hint: str
) -> None:
    explained = environment.explain(log)
    assert log.splitlines()[-1] in explained
    assert hint in explained.rsplit("\n\n", 1)[1]


def test_an_unreachable_registry_is_explained(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Real pip, and an index at a port where nobody listens."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "python", f'exec "{sys.executable}" "$@"')
    monkeypatch.setattr(environment, "VENV", tmp_path)
    monkeypatch.setattr(environment, "LOG", tmp_path / "setup.log")
    for name in [name for name in os.environ if name.startswith("PIP_") or "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(environment.SetupError, match="registry could not be reached"):
        environment.pip_install(["localllm-has-no-such-dependency"])


def test_the_editable_install_keeps_only_its_import_hook(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "lib/python3.11/site-packages/_editable_skbc_localllm.pth"
    file.parent.mkdir(parents=True)
    file.write_text("import _editable_skbc_localllm\n/home/me/localllm\n/home/me\n")
    monkeypatch.setattr(environment, "VENV", tmp_path)
    environment.hide_folders()
    assert file.read_text() == "import _editable_skbc_localllm\n"


def test_a_second_setup_waits_for_the_first(environment: ModuleType) -> None:
    entered = threading.Event()

    def second() -> None:
        with environment.one_at_a_time():
            entered.set()

    thread = threading.Thread(target=second)
    with environment.one_at_a_time():
        thread.start()
        assert not entered.wait(0.2)
    thread.join(timeout=30)
    assert entered.is_set()


@pytest.mark.parametrize("broken", ["absent", "moved", "another Python", "dead link"])
def test_an_environment_that_cannot_serve_is_made_anew(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    monkeypatch.setattr(environment, "VENV", tmp_path)
    minor = sys.version_info.minor
    answer = program(tmp_path / "bin/python", f"echo {sys.base_prefix} 3 {minor}")
    (tmp_path / "bin/activate").write_text(f"VIRTUAL_ENV={tmp_path}")
    assert environment._venv_works()
    if broken == "absent":
        (tmp_path / "bin/activate").unlink()
    elif broken == "moved":
        (tmp_path / "bin/activate").write_text("VIRTUAL_ENV=/elsewhere/.venv")
    elif broken == "another Python":
        program(answer, f"echo {sys.base_prefix} 3 {minor + 1}")
    else:
        answer.unlink()
        answer.symlink_to("/nowhere/python")
    assert not environment._venv_works()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose environment is in place; its `localllm` and `pytest` repeat what they get."""
    folder = (tmp_path / "clone").resolve()
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "kernels_cpu").mkdir()
    for name in ("localllm", "pytest", "python"):
        program(folder / ".venv/bin" / name, f'echo "{name}:" "$@"')
    (folder / ".venv/.stamp-setup").write_text(f"{folder}\n")
    return folder


def inherited() -> dict[str, str]:
    """The environment without what an outer make hands down."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "MODEL", "PROMPT", "ARGS")
    return {name: value for name, value in os.environ.items() if name not in outer}


def make(clone: Path, *arguments: str, **options: object) -> str:
    run = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=clone,
        env=inherited(),
        text=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    return run.stdout


def test_chat_without_a_terminal_answers_one_prompt(clone: Path) -> None:
    said = make(clone, "chat", stdin=subprocess.DEVNULL)
    assert said.startswith("localllm: run smollm2:135m Why is the sky blue?")


def test_chat_with_a_terminal_opens_the_chat(clone: Path) -> None:
    controller, terminal = pty.openpty()
    try:
        subprocess.run(
            ["make", "--no-print-directory", "chat"],
            cwd=clone,
            env=inherited(),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            check=True,
        )
        said = os.read(controller, 1000).decode()
    finally:
        os.close(controller)
        os.close(terminal)
    assert said.strip() == "localllm: chat smollm2:135m"


def test_chat_takes_another_model_and_prompt(clone: Path) -> None:
    said = make(clone, "chat", "MODEL=gemma3:270m", "PROMPT=Hello, you", stdin=subprocess.DEVNULL)
    assert said == "localllm: run gemma3:270m Hello, you\n"


def test_make_test_leaves_out_the_slow_tests(clone: Path) -> None:
    workers = "-n auto --maxprocesses 4 --dist worksteal"
    assert make(clone, "test") == f"pytest: {workers} -m not slow\n"
    assert make(clone, "test", "ARGS=-k hub") == f"pytest: {workers} -m not slow -k hub\n"


def test_nothing_is_set_up_twice(clone: Path) -> None:
    assert "Nothing to be done" in make(clone, "setup")


@pytest.mark.parametrize("changed", ["pyproject.toml", "CMakeLists.txt", "kernels_cpu/new.cpp"])
def test_a_change_to_the_build_sets_up_again(clone: Path, changed: str) -> None:
    os.utime(clone / ".venv/.stamp-setup", (1, 1))
    for name in ("pyproject.toml", "CMakeLists.txt"):
        os.utime(clone / name, (0, 0))
    (clone / changed).touch()
    assert "environment.py project test" in make(clone, "--dry-run", "setup")


def test_a_moved_clone_is_set_up_again(clone: Path, tmp_path: Path) -> None:
    moved = clone.rename(tmp_path / "moved")
    assert "environment.py project test" in make(moved, "--dry-run", "setup")


def test_a_lost_python_is_set_up_again(clone: Path) -> None:
    (clone / ".venv/bin/python").unlink()
    assert "environment.py project test" in make(clone, "--dry-run", "setup")


def test_another_python_makes_another_environment(clone: Path, tmp_path: Path) -> None:
    program(clone / ".venv/bin/python", "echo /usr 3 11")
    same = program(tmp_path / "same", "echo /usr 3 11")
    other = program(tmp_path / "other", "echo /usr 3 13")
    assert "environment.py project test" not in make(clone, "-n", "setup", f"PYTHON={same}")
    assert "environment.py project test" in make(clone, "-n", "setup", f"PYTHON={other}")


def test_help_is_the_default_and_lists_the_targets(clone: Path) -> None:
    said = make(clone)
    assert said == make(clone, "help")
    for target in ("setup", "chat", "test", "test-all", "check", "bench", "goldens", "format"):
        assert f"\n  {target} " in said


def test_continuous_integration_runs_the_tests() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("make test")
