"""Which clang compiles kernels, and which tools compile and link the rest."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from localllm.errors import BackendUnavailable

_NEWEST, _OLDEST = 22, 17
_HINT = (
    "pip install 'ziglang>=0.15,<0.18' brings one; or install clang 17 or newer; or set "
    "LOCALLLM_CLANG to its path"
)


@dataclass(frozen=True)
class Toolchain:
    """clang: the compiler of kernels. host: compiles the runtime, `-c` and all other arguments to
    come. linker: makes a shared object of objects. version: goes into the keys of programs."""

    clang: tuple[str, ...]
    host: tuple[str, ...]
    linker: tuple[str, ...]
    version: str

    @property
    def machine(self) -> str:
        return platform.machine()

    @property
    def target(self) -> str:
        return f"--target={self.machine}-linux-gnu"

    @property
    def tuning(self) -> tuple[str, ...]:
        """What this CPU has of the instructions that make half precision quick."""
        if self.machine != "x86_64":
            return ()
        return ("-march=x86-64-v3",) if _has_v3() else ("-march=x86-64",)


def toolchain() -> Toolchain:
    """LOCALLLM_CLANG, else the clang of an installed `ziglang`, else clang-22 … clang-17 or clang
    on PATH. Raises BackendUnavailable if there is none, or on a system that is not Linux."""
    return _found(os.environ.get("LOCALLLM_CLANG", ""), os.environ.get("PATH", ""))


@cache
def _found(chosen: str, _path: str) -> Toolchain:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise BackendUnavailable(
            f"the Metal emulator runs on Linux on x86-64 and arm64, not on {sys.platform} on "
            f"{platform.machine()}",
        )
    if chosen:
        return _clang(_resolved(chosen))
    if zig := _zig():
        return _of_zig(zig)
    names = [f"clang-{n}" for n in range(_NEWEST, _OLDEST - 1, -1)]
    for name in [*names, "clang"]:
        if path := shutil.which(name):
            return _clang(path)
    raise BackendUnavailable("the Metal emulator needs clang, and there is none", hint=_HINT)


def _resolved(chosen: str) -> str:
    path = shutil.which(chosen)
    if path is None:
        raise BackendUnavailable(f"LOCALLLM_CLANG={chosen}: no such program", hint=_HINT)
    return path


def _zig() -> str | None:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    zig = Path(spec.origin).parent / "zig"
    return str(zig) if os.access(zig, os.X_OK) else None


def _of_zig(zig: str) -> Toolchain:
    # `zig clang` is the plain compiler; `zig c++` knows where the headers of libc are.
    target = f"{platform.machine()}-linux-gnu"
    return Toolchain(
        clang=(zig, "clang"),
        host=(zig, "c++", "-target", target, "-mcpu=baseline", "-fno-sanitize=all"),
        linker=(zig, "ld.lld", "-shared"),
        version=_version((zig, "clang")),
    )


def _clang(path: str) -> Toolchain:
    if Path(path).name == "zig":
        return _of_zig(path)
    version = _version((path,))
    number = _major(version)
    if number is None or number < _OLDEST:
        raise BackendUnavailable(
            f"{path} is {version!r}; the Metal emulator needs clang {_OLDEST} or newer", hint=_HINT
        )
    for name in (f"ld.lld-{number}", "ld.lld", "ld"):
        if linker := shutil.which(name):
            return Toolchain((path,), (path, "-x", "c++"), (linker, "-shared"), version)
    raise BackendUnavailable("the Metal emulator needs a linker (ld or ld.lld)", hint=_HINT)


def _version(clang: Sequence[str]) -> str:
    run = subprocess.run([*clang, "--version"], capture_output=True, text=True, check=False)
    first, _, _ = run.stdout.partition("\n")
    if run.returncode or "clang version" not in first:
        raise BackendUnavailable(f"{' '.join(clang)} is no clang: {run.stderr[:200]}", hint=_HINT)
    return first.strip()


def _major(version: str) -> int | None:
    digits = version.partition("clang version ")[2].partition(".")[0]
    return int(digits) if digits.isdigit() else None


@cache
def _has_v3() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"} <= set(flags)
