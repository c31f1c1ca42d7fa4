"""Makes `.venv` at the root of the clone and installs localllm in it; called by the Makefile.

    python scripts/environment.py project test   # localllm itself, editable, with extra `test`
    python scripts/environment.py extra dev      # only what the extra `dev` adds

Runs on the standard library alone. What pip says goes to `.venv/setup.log`; on a failure its end
is shown, with what to do about it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = VENV / "setup.log"

COMPILER_HINT = """\
localllm builds its CPU engine from C++ and needs a compiler (g++ or clang++ with C++17).
  Debian, Ubuntu:  sudo apt install g++
  Fedora:          sudo dnf install gcc-c++
  macOS:           xcode-select --install
If it lies elsewhere, name it: CXX=/path/to/compiler make"""

HEADERS_HINT = """\
The C headers of {python} are missing; the CPU engine is built against them.
  Debian, Ubuntu:  sudo apt install python{version}-dev
  Fedora:          sudo dnf install python3-devel"""

VENV_HINT = """\
{python} cannot make virtual environments: its module `{module}` is missing.
  Debian, Ubuntu:  sudo apt install python{version}-venv"""

NETWORK_HINT = """\
The package registry could not be reached. Check the network (and `pip config list`, if you use a
mirror), then run make again; it goes on where it stopped."""

DISTRIBUTION_HINT = """\
The registry has no build of a package for {python} (Python {version}) on this platform.
Try another Python: make clean && make PYTHON=python3.12"""

NETWORK_SIGNS = (
    "NewConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "NameResolutionError",
    "ProxyError",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "Connection refused",
)


class SetupError(Exception):
    """Ends the set-up; the message is all the user needs to see."""


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["project", extra]:
            steps = (check_python, check_compiler, create_venv, lambda: install_project(extra))
        case ["extra", extra]:
            steps = (lambda: install_extra(extra),)
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    try:
        with one_at_a_time():
            for step in steps:
                step()
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Two set-ups at once would install into the same folders: the second one waits."""
    with Path(__file__).open("a") as file:  # NFS locks only what is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another set-up of this clone …", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_python() -> None:
    """Everything of a Python installation that Linux distributions package apart."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for module in ("venv", "ensurepip"):
        if find_spec(module) is None:
            raise SetupError(
                VENV_HINT.format(python=sys.executable, module=module, version=version)
            )
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise SetupError(HEADERS_HINT.format(python=sys.executable, version=version))


def check_compiler() -> None:
    """Compiles three lines: on macOS `clang++` exists even where no compiler is installed."""
    program = "#include <atomic>\n#include <vector>\nint main() { return 0; }\n"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    complaint = ""
    for name in names:
        if shutil.which(name.split()[0]) is None:
            continue
        run = subprocess.run(
            [*name.split(), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"],
            input=program,
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode == 0:
            # Else the build takes the one that Python itself was built with, which may not be here.
            os.environ["CXX"] = name
            return
        complaint = f"{name} does not work:\n{run.stderr.strip()}\n\n"
    raise SetupError(complaint + COMPILER_HINT)


def create_venv() -> None:
    """Makes `.venv`; makes it anew where it was moved, lost its Python or shall have another."""
    if _venv_works():
        return
    print("Creating .venv …", flush=True)
    run = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise SetupError(f"Could not create {VENV}:\n{run.stdout}{run.stderr}".rstrip())


def install_project(extra: str) -> None:
    """Installs localllm editable, building the native module in place.

    Without build isolation the tools keep their paths, so that a changed C++ file is compiled
    alone instead of everything with it.
    """
    print(f"Installing localllm and its dependencies (log: {LOG.relative_to(ROOT)}) …", flush=True)
    LOG.write_text("")
    pip_install(pyproject()["build-system"]["requires"])
    pip_install(_further_build_requirements())
    pip_install(["--no-build-isolation", "--editable", f".[{extra}]"])
    hide_folders()


def hide_folders() -> None:
    """Takes the clone and its parent off the import path, where the editable install puts them.

    Else `models`, `tui` and `tests`, and whatever lies beside the clone, import at top level. The
    import hook, the other line of the file, finds all of `localllm` by itself.
    """
    for path_file in VENV.glob("lib/python*/site-packages/_editable_skbc_localllm.pth"):
        lines = path_file.read_text().splitlines(keepends=True)
        path_file.write_text("".join(line for line in lines if line.startswith("import ")))


def install_extra(extra: str) -> None:
    print(f"Installing the extra `{extra}` (log: {LOG.relative_to(ROOT)}) …", flush=True)
    LOG.write_text("")
    pip_install(pyproject()["project"]["optional-dependencies"][extra])


def pip_install(what: list[str]) -> None:
    if not what:
        return
    command = [str(VENV / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check"]
    with LOG.open("a") as log:
        log.write(f"\n$ pip install {' '.join(what)}\n")
        log.flush()
        run = subprocess.run(
            [*command, *what], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if run.returncode != 0:
        raise SetupError(explain(LOG.read_text(errors="replace")))


def explain(log: str) -> str:
    """The end of pip's log, and the way out last, where it is seen."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    end = "\n".join(log.splitlines()[-40:])
    if "found no compiler" in log:
        hint = COMPILER_HINT
    elif any(sign in end for sign in NETWORK_SIGNS):  # earlier ones may have been overcome
        hint = NETWORK_HINT
    elif "No matching distribution found" in log:
        hint = DISTRIBUTION_HINT.format(python=sys.executable, version=version)
    else:
        hint = f"The installation failed; the whole log is in {LOG}."
    return f"{end}\n\n{hint}"


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _further_build_requirements() -> list[str]:
    """What the build backend asks for on this machine: cmake and ninja where they are missing."""
    ask = (
        "from scikit_build_core.build import get_requires_for_build_editable as ask\n"
        "print('\\n'.join(ask({})))"
    )
    run = subprocess.run(
        [str(VENV / "bin/python"), "-c", ask], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise SetupError(f"The build backend failed:\n{run.stderr}".rstrip())
    return run.stdout.split("\n")[:-1] if run.stdout.strip() else []


def _venv_works() -> bool:
    activate = VENV / "bin/activate"
    if not activate.exists() or str(VENV) not in activate.read_text():
        return False  # absent, or its scripts name another place
    ask = "import sys, pip; print(sys.base_prefix, *sys.version_info[:2])"
    try:
        run = subprocess.run(
            [str(VENV / "bin/python"), "-c", ask], capture_output=True, text=True, check=False
        )
    except OSError:
        return False  # a link to a Python that is gone
    return run.stdout.split() == [*sys.base_prefix.split(), *map(str, sys.version_info[:2])]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
