"""The emulator as a command: python -m localllm.kernels_metal.emulator FILE.metal …"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from localllm.errors import LocalLLMError
from localllm.kernels_metal.emulator import report, selfcheck
from localllm.kernels_metal.emulator.buffers import make_buffers
from localllm.kernels_metal.emulator.chips import find_chip
from localllm.kernels_metal.emulator.emulator import Emulator
from localllm.kernels_metal.emulator.faults import KernelFault
from localllm.kernels_metal.emulator.own import is_own, run_own
from localllm.kernels_metal.emulator.plain import PlainKernel, PlainRun, check_plain, run_plain
from localllm.kernels_metal.emulator.program import ORDERS
from localllm.kernels_metal.emulator.signature import (
    Signature,
    kernel_names,
    read_signature,
)
from localllm.kernels_metal.kernel import Size

OK, FAULT, USAGE = 0, 1, 2
_PIPED = 140  # columns, where no terminal says how many
_INCLUDE = re.compile(r'^[ \t]*#include "([^"]+)"[^\n]*$', re.MULTILINE)
_EPILOG = """\
examples:
  check types only       %(prog)s add.metal
  run it                 %(prog)s add.metal --grid 1024 1 1 --threadgroup 256 1 1 \\
                           --buffer a=1024 b=1024 out=1024
  a kernel template      %(prog)s mm.metal --template T=half N=4 …
  in every lane order    … --orders
  one of this package    %(prog)s kernels_metal/qmv.metal --dtype bfloat16 --orders

buffers, NAME=…: [TYPE:]SHAPE[:FILL] (q=4x64, q=half:4x64:zeros), a value for a reference (n=64),
or a .npy file. Fills: random (of inputs), unset (NaN; of outputs), zeros, ones, arange.
exit code: 0 no fault found, 1 a fault, 2 bad usage."""


class Usage(LocalLLMError):
    """An argument that makes no sense."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m localllm.kernels_metal.emulator",
        description="Checks a Metal kernel and runs it on the CPU, in lockstep, to find its faults "
        "and to count what it moves. No GPU is used, and no speed is measured.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("file", nargs="?", help="a Metal source, or one of this package's own (NAME.metal)")
    add("--kernel", metavar="NAME", help="which kernel of the file")
    add("--template", nargs="+", default=[], metavar="NAME=VALUE", help="of a kernel template")
    add("--constant", nargs="+", default=[], metavar="NAME=VALUE", help="function constants")
    add("--grid", nargs=3, type=int, metavar=("X", "Y", "Z"), help="threads in all")
    add("--threadgroup", nargs=3, type=int, metavar=("X", "Y", "Z"), help="threads in one group")
    add("--buffer", nargs="+", action="extend", default=[], metavar="NAME=…")
    add("--save", nargs="+", action="extend", default=[], metavar="NAME=FILE.npy")
    add("--orders", action="store_true", help="run in three lane orders and compare bits")
    add("--strict", action="store_true", help="reading what nothing wrote is a fault too")
    add("--seed", type=int, default=1, help="of random buffers and of the random order")
    add("--least", type=int, metavar="BYTES", help="the least that must be moved, if you know it")
    add("--chip", nargs="+", default=["m2"], metavar="NAME", help="m1 … m5-ultra, for the estimate")
    add(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="for a source of this package",
    )
    add("--json", action="store_true", help="print JSON")
    add("--self-check", action="store_true", help="run kernels that ship with MLX, and compare")
    add("--chips", action="store_true", help="list the chips, their figures and the sources")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    try:
        options = made.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed why
        return int(stop.code or 0)
    console = Console() if sys.stdout.isatty() else Console(width=_PIPED)
    try:
        return _run(options, console)
    except KernelFault as fault:
        return _tell(options.json, "fault", fault, FAULT)
    except LocalLLMError as error:
        return _tell(options.json, "error", error, USAGE)


def _tell(as_json: bool, kind: str, error: LocalLLMError, code: int) -> int:
    if as_json:
        print(json.dumps({kind: str(error), "hint": error.hint}, indent=2))
        return code
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"{kind}: {error}", style="red", markup=False, highlight=False)
    if error.hint:
        console.print(f"hint: {error.hint}", markup=False, highlight=False)
    return code


def _run(options: argparse.Namespace, console: Console) -> int:
    if options.chips:
        report.show_chips(console)
        return OK
    if options.self_check:
        return _self_check(options.json, console)
    if options.file is None:
        raise Usage("no file", hint="give a .metal file, or --self-check; --help shows examples")
    chips = [find_chip(name) for name in options.chip]
    path = Path(options.file)
    if is_own(path):
        return run_own(options, path, console)
    source = _text(path)
    if options.grid is None and options.kernel is None and len(kernel_names(source)) > 1:
        return _check_all(options, source, path, console)
    signature = read_signature(source, options.kernel)
    template = _pairs("--template", options.template, list(signature.template))
    missing = [n for n, default in signature.template.items() if not (default or n in template)]
    if missing:
        raise Usage(f"{signature.name} is a template: --template needs {', '.join(missing)}")
    constants = _pairs("--constant", options.constant, list(signature.constants))
    kernel = PlainKernel(source, signature.name, template, constants, path.name)
    if options.grid is None:
        return _check(options, kernel, signature, console)
    if options.threadgroup is None:
        raise Usage("--grid needs --threadgroup", hint="for example --threadgroup 256 1 1")
    grid, threadgroup = _size("--grid", options.grid), _size("--threadgroup", options.threadgroup)
    buffers = make_buffers(signature, options.buffer, template, options.seed)
    orders = ORDERS if options.orders else ORDERS[:1]
    runs = [
        run_plain(
            Emulator(order=order, seed=options.seed, strict=options.strict),
            kernel,
            buffers,
            grid,
            threadgroup,
        )
        for order in orders
    ]
    _compare(signature, orders, runs)
    _save(signature, options.save, runs[0])
    held = _held(signature, template, runs[0])
    least = options.least or sum(each.nbytes for each in held)
    counters = runs[0].counters
    made = report.Report(
        str(path),
        signature.name,
        grid,
        threadgroup,
        list(orders),
        counters,
        held,
        least,
        report.estimates(chips, counters),
    )
    if options.json:
        print(json.dumps(report.as_json(made), indent=2))
    else:
        report.show(console, made)
    return OK


def _self_check(as_json: bool, console: Console) -> int:
    outcomes = list(selfcheck.self_check(Emulator()))
    if as_json:
        print(json.dumps([selfcheck.as_json(outcome) for outcome in outcomes], indent=2))
    else:
        report.show_outcomes(console, outcomes)
    return OK if all(outcome.passed for outcome in outcomes) else FAULT


def _check(
    options: argparse.Namespace, kernel: PlainKernel, signature: Signature, console: Console
) -> int:
    for name in ("buffer", "save", "threadgroup", "orders", "least", "strict"):
        if getattr(options, name):
            raise Usage(f"--{name} needs --grid", hint="without --grid only the types are checked")
    check_plain(kernel)
    if options.json:
        print(json.dumps({"kernel": signature.name, "checked": True}))
    else:
        buffers = ", ".join(parameter.name for parameter in signature.parameters)
        console.print(
            f"{signature.name}: types are right under the rules of Metal 4.1 and of 4.0 and older. "
            f"To run it: --grid, --threadgroup, --buffer for {buffers}",
            highlight=False,
        )
    return OK


def _check_all(options: argparse.Namespace, source: str, path: Path, console: Console) -> int:
    """Every kernel of a file; templates only with their arguments."""
    checked, left = [], []
    for name in kernel_names(source):
        signature = read_signature(source, name)
        if all(signature.template.values()):
            constants = _pairs("--constant", options.constant, list(signature.constants))
            check_plain(PlainKernel(source, name, {}, constants, path.name))
            checked.append(name)
        else:
            left.append(name)
    if options.json:
        print(json.dumps({"checked": checked, "templates_not_checked": left}))
        return OK
    if checked:
        console.print(f"types are right: {', '.join(checked)}", highlight=False)
    for name in left:
        console.print(f"not checked: {name} is a template; --kernel {name} --template …")
    return OK


def _held(signature: Signature, template: dict[str, str], run: PlainRun) -> list[report.Held]:
    return [
        report.describe(
            parameter,
            template.get(parameter.kind, parameter.kind),
            run.buffers[parameter.index],
            run.traffic[parameter.name],
        )
        for parameter in signature.parameters
    ]


def _compare(signature: Signature, orders: Sequence[str], runs: Sequence[PlainRun]) -> None:
    for order, run in zip(orders[1:], runs[1:], strict=True):
        for parameter in signature.parameters:
            before, after = (each.buffers[parameter.index] for each in (runs[0], run))
            if before.tobytes() != after.tobytes():
                different = int((before.view(np.uint8) != after.view(np.uint8)).sum())
                raise KernelFault(
                    f"buffer `{parameter.name}` differs between lane orders {orders[0]} and "
                    f"{order}, in {different} bytes",
                    kernel=signature.name,
                    stage="run",
                    kind="lane order",
                    hint="a barrier is missing, or two threads write the same place",
                )


def _save(signature: Signature, wanted: Sequence[str], run: PlainRun) -> None:
    places = {parameter.name: parameter.index for parameter in signature.parameters}
    for name, file in _pairs("--save", wanted, list(places)).items():
        try:
            np.save(file, run.buffers[places[name]])
        except OSError as error:
            raise Usage(f"--save {name}={file}: {error}") from error


def _pairs(option: str, given: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise Usage(f"{option} {text}: not NAME=VALUE")
        if name not in known:
            there = ", ".join(known) or "none"
            raise Usage(f"{option} {text}: there is no {name}", hint=f"there are: {there}")
        pairs[name] = value
    return pairs


def _size(option: str, given: Sequence[int]) -> Size:
    if min(given) < 1:
        raise Usage(f"{option} {' '.join(map(str, given))}: every size must be at least 1")
    return given[0], given[1], given[2]


def _text(path: Path, seen: frozenset[Path] = frozenset()) -> str:
    """With `#include "file"` of the same folder taken in; <…> is left to the emulator."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"{path}: {error}") from error

    def included(match: re.Match[str]) -> str:
        other = path.parent / match[1]
        if not other.exists() or other in seen:
            return "" if other in seen else match[0]
        line = text.count("\n", 0, match.start()) + 2
        inside = _text(other, seen | {path, other})
        return f'#line 1 "{other.name}"\n{inside}\n#line {line} "{path.name}"'

    return _INCLUDE.sub(included, text)
