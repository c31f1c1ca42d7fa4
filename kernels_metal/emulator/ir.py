"""What is read from, and put into, the LLVM text between clang's two runs.

The first run writes the kernel down before any optimisation, so all its functions, variables and
accesses are there to be seen; the second optimises and compiles the text that `instrumented` gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

GAP = 512  # bytes after every threadgroup variable and before the first, that no one may touch

_DEFINE = re.compile(r'^define .*?@("?[^"(]+"?)\(')
_CALLED = re.compile(r'\b(?:call|invoke)\b[^@]*@("?[^"(]+"?)\(')
_VARIABLE = re.compile(r"^@(_ZZ\w+) = internal (?:unnamed_addr )?global (.*?) (?:undef|poison),")
_MUTABLE = re.compile(r"^@([A-Za-z_]\w*) = (?:\w+ )*global ")
_ACCESS = re.compile(
    r"^  (?:%\S+ = load (?:volatile )?|store (?:volatile )?)"
    r"(<\d+ x \w+>)(?:, ptr | .*?, ptr )(%[\w.]+)(?:, align (\d+))"
)
_ALLOCA = re.compile(r"^  (%[\w.]+) = alloca ")


def recursion(text: str) -> list[str]:
    """The mangled names of functions that call each other in a circle; empty if there is none."""
    calls: dict[str, set[str]] = {}
    function = ""
    for line in text.splitlines():
        if match := _DEFINE.match(line):
            function = match[1]
            calls[function] = set()
        elif function and (called := _CALLED.search(line)):
            calls[function].add(called[1])
        elif line == "}":
            function = ""
    state: dict[str, int] = {}

    def circle(name: str, path: list[str]) -> list[str]:
        if state.get(name) == 1:
            return path[path.index(name) :]
        if name not in calls or name in state:
            return []
        state[name] = 1
        for callee in sorted(calls[name]):
            if found := circle(callee, [*path, name]):
                return found
        state[name] = 2
        return []

    for name in calls:
        if found := circle(name, []):
            return found
    return []


def program_variables(text: str) -> list[str]:
    """Variables at program scope, or static in a function, that are not constant."""
    return [
        match[1]
        for line in text.splitlines()
        if (match := _MUTABLE.match(line)) and not _VARIABLE.match(line) and "undef" not in line
    ]


def threadgroup_symbols(text: str) -> list[str]:
    return [match[1] for line in text.splitlines() if (match := _VARIABLE.match(line))]


def plain(symbol: str) -> str:
    """`t` of _ZZ6kernelE1t, the mangled name of a variable in a function."""
    match = re.match(r"_ZZ(\d+)", symbol)
    rest = symbol[match.end() + int(match[1]) :] if match else symbol
    named = re.search(r"E(\d+)(\w+)", rest)
    return named[2][: int(named[1])] if named else symbol


def instrumented(text: str, *, watch: bool) -> str:
    """Threadgroup variables get gaps around them and names that a loader finds; with `watch`,
    loads and stores of vectors have the alignment of their type checked."""
    return "\n".join(_instrumented(text, watch)) + "\n"


def _instrumented(text: str, watch: bool) -> Iterator[str]:
    sizes: list[str] = []
    symbols: list[str] = []
    allocas: set[str] = set()
    aligned = False
    for line in text.splitlines():
        if match := _VARIABLE.match(line):
            symbol, kind = match[1], match[2]
            if not sizes:
                yield f"@msl_before = global [{GAP} x i8] zeroinitializer, {_PLACED}, align 64"
            yield f"@{symbol} = global {{ {kind}, [{GAP} x i8] }} undef, {_PLACED}, align 64"
            end = f"ptr getelementptr ({kind}, ptr null, i32 1)"
            sizes.append(f"@msl_size_{len(sizes)} = constant i64 ptrtoint ({end} to i64)")
            symbols.append(symbol)
            continue
        if line.startswith("define "):
            allocas = set()
        elif match := _ALLOCA.match(line):
            allocas.add(match[1])
        elif watch and (match := _ACCESS.match(line)) and match[2] not in allocas:
            yield f"  call void @msl_aligned(ptr {match[2]}, i64 {match[3]}){_debug(line)}"
            aligned = True
        yield line
    if sizes:
        yield f"@msl_after = global [1 x i8] zeroinitializer, {_PLACED}, align 64"
    yield from sizes
    names = " ".join(symbols)
    yield f'@msl_names = private constant [{len(names) + 1} x i8] c"{names}\\00"'
    yield "@msl_symbols = constant ptr @msl_names"
    if aligned:
        # It touches no memory that the kernel sees, so it keeps no load from being joined.
        yield "declare void @msl_aligned(ptr, i64) nounwind memory(inaccessiblemem: readwrite)"


_PLACED = 'section "msl_threadgroup"'


def _debug(line: str) -> str:
    match = re.search(r", !dbg !\d+", line)
    return match[0] if match else ""
