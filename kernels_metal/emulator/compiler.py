"""A lowered kernel, checked by clang under both sets of rules and compiled to a shared object."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Sequence
from functools import cache as memoised
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from localllm.errors import BackendUnavailable
from localllm.kernels_metal.emulator import cache, ir
from localllm.kernels_metal.emulator.faults import KernelFault, Place, in_metal_words
from localllm.kernels_metal.emulator.toolchain import Toolchain, toolchain

HERE = Path(__file__).parent
SHIM = HERE / "shim"
RUNTIME = HERE / "runtime"

# What Metal's C++ leaves out. `noexcept` stays: MLX's own headers have it.
_FORBIDDEN = (
    "double", "vertex", "fragment", "asm", "goto", "register", "thread_local", "virtual", "try",
    "catch", "throw", "dynamic_cast", "typeid", "new", "delete",
)  # fmt: skip
PREAMBLE = '#include "mlx/backend/metal/kernels/utils.h"\n'
RULES = f"#pragma GCC poison {' '.join(_FORBIDDEN)}\n"
_WARNINGS = (
    "-Wall", "-Wno-unused", "-Wno-unknown-attributes", "-Wimplicit-float-conversion",
    "-Werror=return-type", "-Werror=array-bounds", "-Werror=division-by-zero",
    "-Werror=shift-count-overflow", "-Werror=shift-count-negative", "-Werror=infinite-recursion",
    "-Werror=dangling",
)  # fmt: skip
_CHECKS = "-fsanitize=array-bounds,integer-divide-by-zero,return"
_WATCH = "-fsanitize=kernel-address"
_WATCH_CODE = tuple(
    part
    for option in (
        "asan-instrumentation-with-call-threshold=0",  # calls, no inline checks
        "asan-stack=0", "asan-globals=0",
        "asan-opt=0",  # report every access, also one that a neighbour makes needless
        "asan-use-after-scope=0",
    )
    for part in ("-mllvm", f"-{option}")
)  # fmt: skip
# Each meeting point must stay one place in the code: no copies of calls, none merged.
_ONE_PLACE = tuple(
    part
    for option in ("disable-tail-duplicate", "tail-dup-placement=0", "enable-tail-merge=0")
    for part in ("-mllvm", f"-{option}")
)
# Metal 4.0 and older: an unqualified pointer is `thread`. clang then refuses struct copies too,
# which Metal allows, so only what speaks of pointers and calls counts.
_NO_GENERIC = (
    "-Xclang",
    "-cl-ext=-__opencl_c_generic_address_space,-__opencl_c_program_scope_global_variables,"
    "-__opencl_c_pipes,-__opencl_c_device_enqueue",
)
_OLD_RULE = re.compile(
    r"error: (no matching (member )?function for call|.*changes address space|cannot initialize|"
    r".*address space of pointer)"
)
_MESSAGE = re.compile(r"^(.+?):(\d+):(\d+): (?:fatal )?(error|warning): (.*)$")


def program(text: str, name: str, *, watch: bool, flags: Sequence[str] = ()) -> Path:
    """The shared object of a kernel, from the disk if it was compiled before.

    text: preamble and all. name: for messages. watch: report every access to the runtime. flags:
    more of clang's, such as `-I folder`. Raises KernelFault, BackendUnavailable.
    """
    tools = toolchain()
    key = _key(text, str(watch), *flags, *tools.tuning)
    return cache.kept(key, lambda folder: _compiled(text, name, watch, flags, tools, folder))


@memoised
def runtime() -> Path:
    """The shared object of the runtime, compiled once for a machine."""
    tools = toolchain()

    def make(folder: Path) -> Path:
        compiled, linked = folder / "runtime.o", folder / "runtime.so"
        _must([
            *tools.host, "-c", str(RUNTIME / "runtime.cpp"), "-o", str(compiled), "-std=c++17",
            "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-stack-protector",
            "-fvisibility=hidden", "-ffp-contract=off", "-w",
        ])  # fmt: skip
        _must([*tools.linker, str(compiled), "-o", str(linked)])
        return linked

    return cache.kept(_key("runtime"), make)


def _key(*parts: str) -> str:
    digest = hashlib.sha256("\0".join((*parts, _ours(), version("mlx"))).encode())
    return digest.hexdigest()[:32]


@memoised
def _ours() -> str:
    """What every program depends on: the compiler, and the sources of this package."""
    files = sorted(p for folder in (SHIM, RUNTIME) for p in folder.rglob("*") if p.is_file())
    files += [HERE / "compiler.py", HERE / "ir.py"]
    digest = hashlib.sha256(toolchain().version.encode())
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@memoised
def _mlx_headers() -> Path:
    return Path(mx.__file__).parent / "include"


def _language(tools: Toolchain) -> list[str]:
    return [
        "-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", tools.target, "-fPIC",
        "-ferror-limit=20", "-fno-caret-diagnostics", "-isystem", str(SHIM),
        "-isystem", str(_mlx_headers()),
    ]  # fmt: skip


def _compiled(
    text: str, name: str, watch: bool, flags: Sequence[str], tools: Toolchain, folder: Path
) -> Path:
    source, ll, linked = folder / "kernel.clcpp", folder / "kernel.ll", folder / "kernel.so"
    rules = text.replace(PREAMBLE, PREAMBLE + RULES, 1)
    source.write_text(rules)
    checks = f"{_CHECKS},kernel-address" if watch else _CHECKS
    first = _start([
        *tools.clang, *flags, *_language(tools), *_WARNINGS, "-O2", "-Xclang",
        "-disable-llvm-passes", "-S", "-emit-llvm", "-gline-tables-only", "-gdwarf-4", checks,
        "-ftrivial-auto-var-init=pattern",
        "-fstack-clash-protection", str(source), "-o", str(ll),
    ])  # fmt: skip
    older = _start([
        *tools.clang, *flags, *_language(tools), *_NO_GENERIC, "-w", "-fsyntax-only", str(source),
    ])  # fmt: skip
    problems, older_problems = _finished(first), _finished(older)
    intermediate = ll.read_text() if ll.exists() else ""
    shared = {ir.plain(symbol) for symbol in ir.threadgroup_symbols(intermediate)}
    _raise_first(problems, name, str(source), shared)
    _raise_older(older_problems, name)
    if not intermediate:
        raise KernelFault(problems[:1500], kernel=name, stage="compile", kind="compiler")
    _forbid(intermediate, name)
    ll.write_text(ir.instrumented(intermediate, watch=watch))
    (folder / "kernel.o").unlink(missing_ok=True)
    _must([
        *tools.clang, "-x", "ir", tools.target, "-w", "-O2", *tools.tuning, "-fPIC",
        "-ffp-contract=off", *_ONE_PLACE, *([_WATCH, *_WATCH_CODE] if watch else []),
        "-c", str(ll), "-o", str(folder / "kernel.o"),
    ])  # fmt: skip
    _must([*tools.linker, str(folder / "kernel.o"), "-o", str(linked)])
    return linked


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def _finished(process: subprocess.Popen[str]) -> str:
    return process.communicate()[1]


def _must(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if run.returncode:
        raise BackendUnavailable(
            f"{command[0]} failed: {run.stderr[:1000]}",
            hint="LOCALLLM_CLANG chooses another clang",
        )


def _raise_first(problems: str, name: str, scratch: str, shared: set[str]) -> None:
    """The first message of clang that is a fault. shared: names of threadgroup variables."""
    for line in problems.splitlines():
        match = _MESSAGE.match(line)
        if match is None or (match[4] == "warning" and not _is_fault(match[5], shared)):
            continue
        place = None if match[1] == scratch else Place(match[1], int(match[2]), int(match[3]))
        message = in_metal_words(match[5])
        raise KernelFault(message, kernel=name, stage="compile", kind=_kind(message), place=place)


def _is_fault(warning: str, shared: set[str]) -> bool:
    """Of the warnings, only those that Metal has a rule for."""
    if "loses floating-point precision" in warning:  # to half Metal converts, to bfloat it does not
        return "__bf16" in warning.split(" to ")[-1]
    # clang takes a threadgroup variable, which another thread may set, for a local one.
    unset = re.match(r"variable '(\w+)' is (?:used )?uninitialized", warning)
    return unset is not None and unset[1] not in shared


def _raise_older(problems: str, name: str) -> None:
    for line in problems.splitlines():
        if _OLD_RULE.search(line) and (match := _MESSAGE.match(line)):
            raise KernelFault(
                f"{in_metal_words(match[5])} [Metal 4.0 and older: a pointer without an address "
                "space is `thread`]",
                kernel=name, stage="compile", kind="address space",
                place=Place(match[1], int(match[2]), int(match[3])),
                hint="write the address space, or take it as a template parameter; MLX binds "
                "inputs of fewer than 8 elements as `constant`",
            )  # fmt: skip


def _kind(message: str) -> str:
    return "address space" if "address space" in message else "type check"


def _forbid(text: str, name: str) -> None:
    if circle := ir.recursion(text):
        names = " -> ".join(dict.fromkeys(_function(symbol) for symbol in circle))
        raise KernelFault(
            f"recursion: {names} calls itself; Metal has no call stack for it",
            kernel=name, stage="compile", kind="recursion", hint="write it as a loop",
        )  # fmt: skip
    if variables := ir.program_variables(text):
        raise KernelFault(
            f"variable `{_function(variables[0])}` outside a kernel is not constant",
            kernel=name, stage="compile", kind="program variable",
            hint="declare it `constant constexpr`, or pass it in a buffer",
        )  # fmt: skip


def _function(symbol: str) -> str:
    """The plain name in a mangled one; the symbol itself where it is not simple."""
    match = re.match(r"_Z(?:L|ZL|Z)?(\d+)", symbol)
    if match is None:
        nested = re.match(r"_ZN\w*?(\d+)([A-Za-z_]\w*)", symbol)
        return symbol if nested is None else nested[2][: int(nested[1])]
    return symbol[match.end() : match.end() + int(match[1])]
