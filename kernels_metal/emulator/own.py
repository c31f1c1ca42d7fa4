"""A source of this package on the command line: MLX writes its signature, so its contests run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from localllm.errors import LocalLLMError
from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.emulator.measure import Measured, contests_of, measure
from localllm.kernels_metal.emulator.program import ORDERS

_PACKAGE = Path(__file__).parent.parent
_BODY = "//: body\n"
_NOT_HERE = ("kernel", "template", "constant", "grid", "threadgroup", "buffer", "save", "least")


class NoContests(LocalLLMError):
    """A source of this package that no module of its name runs."""


def is_own(path: Path) -> bool:
    """Whether it is a body without a signature, as this package's sources are, or one of those."""
    if path.suffix == ".metal" and path.resolve().parent == _PACKAGE.resolve() and path.exists():
        return True
    try:
        return _BODY in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def run_own(options: argparse.Namespace, path: Path, console: Console) -> int:
    """The exit code: 1 where a result is wrong. Raises KernelFault, NoContests."""
    for name in (*_NOT_HERE, "strict"):
        if getattr(options, name):
            raise NoContests(f"--{name} is of no use: {path.name} runs with its own contests")
    contests = contests_of(path.stem, getattr(mx, options.dtype))
    if contests is None:
        raise NoContests(
            f"{path.name} is part of another kernel: kernels_metal/{path.stem}.py has no contests",
            hint="name the source whose Python module has `contests`",
        )
    orders = ORDERS if options.orders else ORDERS[:1]
    table = _table(f"{path.stem}, {options.dtype}, lane orders {', '.join(orders)}")
    results = []
    for contest in contests:
        measured = measure(contest, orders, options.seed)
        results.append(measured)
        table.add_row(*_row(measured))
    if options.json:
        print(json.dumps([_json(measured) for measured in results], indent=2))
    else:
        console.print(table)
    return 0 if all(measured.right for measured in results) else 1


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("work", overflow="fold")
    for column in ("error", "allowed", "dispatches", "moved", "around", "least", "moved / least"):
        table.add_column(column, justify="right")
    table.add_column("")
    return table


def _row(measured: Measured) -> list[str]:
    contest: Contest = measured.contest
    return [
        contest.work,
        f"{measured.error:.1e}",
        f"{contest.tolerance:.1e}",
        str(measured.dispatches),
        f"{measured.moved:,}",
        f"{measured.around:,}" if measured.around else "",
        f"{contest.least_bytes:,}",
        f"{measured.to_least:.3f}",
        "ok" if measured.right else "WRONG",
    ]


def _json(measured: Measured) -> dict[str, object]:
    contest = measured.contest
    return {
        "kernel": contest.kernel,
        "work": contest.work,
        "error": measured.error,
        "tolerance": contest.tolerance,
        "right": measured.right,
        "dispatches": measured.dispatches,
        "moved": measured.moved,
        "around": measured.around,
        "least_bytes": contest.least_bytes,
    }
