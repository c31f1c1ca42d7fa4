"""Writes the tables of docs/metal.md between their markers.

    python -m scripts.metal_tables [NAME …]

Without names, all of them. A table whose kernels do not exist is left empty. What is written was
obtained in this run, with the installed MLX.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from benchmarks.harness.table import markdown
from benchmarks.metal_bytes import HEADINGS as BYTES_HEADINGS
from benchmarks.metal_bytes import rows as byte_rows
from localllm.kernels_metal.contest import Contest
from localllm.kernels_metal.emulator import Emulator
from localllm.kernels_metal.emulator.measure import contests_of, measure
from localllm.kernels_metal.emulator.mlx_sources import mlx_version
from localllm.kernels_metal.emulator.program import ORDERS
from localllm.kernels_metal.emulator.selfcheck import self_check
from localllm.kernels_metal.kernel import executed_by
from localllm.kernels_metal.registry import KERNELS
from tests.kernels_metal.planted import PLANTS, judge

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metal.md"
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
ROUNDS = 5


def self_check_table() -> str | None:
    rows = []
    for outcome in self_check(Emulator()):
        error = outcome.problem or f"{outcome.error:.1e}"
        verdict = "yes" if outcome.passed else "NO"
        rows.append([outcome.kernel, outcome.work, error, f"{outcome.tolerance:.1e}", verdict])
    table = markdown(["kernel", "work", "error", "allowed", "within"], rows)
    return f"MLX {mlx_version()}.\n\n{table}"


def errors_table() -> str | None:
    """One row for a shape, one column for a type: the error, of what is allowed."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for dtype, contest in all_contests():
        print(f"errors: {contest.kernel}, {contest.work}", file=sys.stderr, flush=True)
        found = measure(contest, ORDERS)
        shape = contest.work.replace(f", {dtype}", "")
        verdict = "" if found.right else " WRONG"
        text = f"{found.error:.1e} of {contest.tolerance:.1e}{verdict}"
        cells.setdefault((contest.kernel, shape), {})[dtype] = text
    rows = [[*key, *(row.get(dtype, "") for dtype in DTYPES)] for key, row in cells.items()]
    return markdown(["kernel", "work", *DTYPES], rows) if rows else None


def bytes_table() -> str | None:
    rows = []
    for kernel in KERNELS:
        for row in byte_rows(kernel, mx.float16):
            print(f"bytes: {row.kernel}, {row.work}", file=sys.stderr, flush=True)
            rows.append(row.cells())
    return markdown(BYTES_HEADINGS, rows) if rows else None


def time_table() -> str | None:
    rows = []
    for kernel in KERNELS:
        contests = contests_of(kernel, mx.float16)
        if not contests:
            continue
        first = [measure(contest) for contest in contests]  # compiles
        again = [measure(contest) for contest in contests]
        smallest = min(first, key=lambda each: each.seconds).contest
        print(f"time: {kernel}", file=sys.stderr, flush=True)
        rows.append(
            [
                kernel,
                str(len(contests)),
                str(sum(each.dispatches for each in again)),
                f"{sum(each.seconds for each in again):.2f}",
                f"{1e3 * _without_counting(smallest):.1f}",
            ]
        )
    headings = ["kernel", "contests", "dispatches", "seconds", "ms, smallest, uncounted"]
    return markdown(headings, rows) if rows else None


def _without_counting(contest: Contest) -> float:
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        with executed_by(Emulator(count=False)):
            mx.eval(contest.ours())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def faults_table() -> str | None:
    rows = []
    for plant in PLANTS:
        found, twin = judge(plant), judge(plant.mended())
        passes = "yes" if twin.stage == "not caught" else f"NO: {twin.message}"
        message = found.message.removeprefix("planted: ").replace(f"{PAGE.parent.parent}/", "")
        rows.append([plant.title, found.stage, message.replace("|", "\\|"), passes])
    caught = sum(row[1] != "not caught" for row in rows)
    table = plain_markdown(["fault", "caught", "what the emulator says", "twin passes"], rows)
    return f"{caught} of {len(rows)} caught.\n\n{table}"


def plain_markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table of sentences, whose columns need not line up in the source."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def all_contests() -> Iterator[tuple[str, Contest]]:
    for kernel in KERNELS:
        for dtype, kind in DTYPES.items():
            for contest in contests_of(kernel, kind) or []:
                yield dtype, contest


TABLES: dict[str, Callable[[], str | None]] = {
    "self-check": self_check_table,
    "faults": faults_table,
    "errors": errors_table,
    "bytes": bytes_table,
    "time": time_table,
}


def put(page: str, name: str, table: str | None) -> str:
    """The page with `table` between its markers. Raises ValueError where there are none."""
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = f"\n{table}\n\n" if table else ""
    page, count = pattern.subn(lambda match: match[1] + text + match[2], page)
    if count != 1:
        raise ValueError(f"{count} places for table {name}")
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", help=f"of {', '.join(TABLES)}")
    names = parser.parse_args().name or list(TABLES)
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        parser.error(f"no table is called {', '.join(unknown)}; there are {', '.join(TABLES)}")
    for name in names:
        table = TABLES[name]()
        PAGE.write_text(put(PAGE.read_text("utf-8"), name, table), "utf-8")
        print(f"{name}: {'written' if table else 'left empty: its kernels do not exist yet'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
