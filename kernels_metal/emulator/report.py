"""What a run of a kernel comes to, for a reader and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from localllm.kernels_metal.emulator.buffers import readable
from localllm.kernels_metal.emulator.chips import CHIPS, Chip, Estimate, estimate
from localllm.kernels_metal.emulator.counters import Counters
from localllm.kernels_metal.emulator.program import Traffic
from localllm.kernels_metal.emulator.selfcheck import Outcome
from localllm.kernels_metal.emulator.signature import Parameter
from localllm.kernels_metal.kernel import Size

CAVEAT = (
    "An estimate from public peaks, not a measurement: no GPU ran, and a real kernel takes longer. "
    "Of arithmetic, only matrix multiplications of simdgroups are counted."
)


@dataclass(frozen=True)
class Held:
    """A buffer after the run. nan: how many values are NaN, as what was never written is. loaded,
    stored: bytes, by the instructions of all threads."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    written: bool
    nan: int
    lowest: float
    highest: float
    first: list[float]
    loaded: int
    stored: int


@dataclass(frozen=True)
class Report:
    """orders: the lane orders that ran, all with the same bits. least: bytes that any way must
    move if it needs every byte of its buffers."""

    file: str
    kernel: str
    grid: Size
    threadgroup: Size
    orders: list[str]
    counters: Counters
    buffers: list[Held]
    least: int
    estimates: list[Estimate]

    @property
    def moved_to_least(self) -> float:
        return self.counters.moved / self.least if self.least else float("nan")


def describe(parameter: Parameter, kind: str, array: np.ndarray, traffic: Traffic) -> Held:
    values = readable(array, kind).astype(np.float64).reshape(-1)
    known = values[~np.isnan(values)]
    return Held(
        parameter.name,
        kind,
        array.shape,
        array.nbytes,
        parameter.writable,
        int(np.isnan(values).sum()),
        float(known.min()) if known.size else float("nan"),
        float(known.max()) if known.size else float("nan"),
        [float(value) for value in values[:4]],
        traffic.loaded,
        traffic.stored,
    )


def estimates(chips: Sequence[Chip], counters: Counters) -> list[Estimate]:
    """Of arithmetic only the 8x8 matrix multiplications are counted."""
    operations = counters.matrix_flops or None
    return [estimate(chip, counters.moved, operations) for chip in chips]


def as_json(report: Report) -> dict[str, Any]:
    return {
        "file": report.file,
        "kernel": report.kernel,
        "grid": list(report.grid),
        "threadgroup": list(report.threadgroup),
        "orders": report.orders,
        "counters": asdict(report.counters) | {"moved": report.counters.moved},
        "buffers": [asdict(held) for held in report.buffers],
        "least_bytes": report.least,
        "moved_to_least": report.moved_to_least,
        "estimates": [
            {
                "chip": each.chip.name,
                "microseconds": each.microseconds,
                "bound_by": each.bound_by,
                "memory_microseconds": each.memory,
                "matrix_microseconds": each.arithmetic,
                "note": CAVEAT,
            }
            for each in report.estimates
        ],
    }


def show(console: Console, report: Report) -> None:
    orders = ", ".join(report.orders)
    same = f"the same bits in lane orders {orders}" if len(report.orders) > 1 else f"order {orders}"
    console.print(
        f"[bold]{report.kernel}[/] of {report.file}: no fault found; {same}",
        highlight=False,
    )
    console.print(_buffers(report), "")
    if report.counters.unwritten:
        console.print(f"{report.counters.unwritten:,} bytes of the outputs were never written\n")
    console.print(_counters(report), "", _cost(report))


def _buffers(report: Report) -> Table:
    table = Table(title="buffers afterwards", title_justify="left", box=None, pad_edge=False)
    for column in ("name", "type", "shape"):
        table.add_column(column)
    for column in ("loaded", "stored", "lowest", "highest", "NaN"):
        table.add_column(column, justify="right")
    table.add_column("first values")
    for held in report.buffers:
        table.add_row(
            held.name + (" (written)" if held.written else ""),
            held.kind,
            "x".join(map(str, held.shape)),
            f"{held.loaded:,}",
            f"{held.stored:,}",
            f"{held.lowest:.5g}",
            f"{held.highest:.5g}",
            str(held.nan) if held.nan else "",
            " ".join(f"{value:.4g}" for value in held.first),
        )
    return table


def _counters(report: Report) -> Table:
    table = Table(title="counters", title_justify="left", box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("count", justify="right")
    for name, value in asdict(report.counters).items():
        table.add_row(name.replace("_", " "), _number(value))
    return table


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cost(report: Report) -> RenderableType:
    lines = [
        Text("cost", style="italic"),
        Text(
            f"moved between memory and chip {report.counters.moved:,} bytes; the least possible, "
            f"if every byte of the buffers is needed, {report.least:,}: "
            f"{report.moved_to_least:.2f} x"
        ),
    ]
    for each in report.estimates:
        chip = each.chip
        rate = (
            f"{chip.bandwidth.value:g} GB/s"
            if each.bound_by == "memory"
            else f"{chip.tflops.value:g} TFLOPS"
        )
        lines.append(
            Text(
                f"estimate for {chip.name}: at least {each.microseconds:.3g} µs, "
                f"bound by {each.bound_by} ({rate})"
            )
        )
    if report.estimates:
        lines.append(Text(CAVEAT, style="dim"))
    return Group(*lines)


def show_outcomes(console: Console, outcomes: Sequence[Outcome]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("MLX's kernel")
    table.add_column("work")
    table.add_column("error", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("")
    for outcome in outcomes:
        verdict = "ok" if outcome.passed else "missing" if outcome.missing else "FAILED"
        error = "" if outcome.error is None else f"{outcome.error:.1e}"
        table.add_row(outcome.kernel, outcome.work, error, f"{outcome.tolerance:.1e}", verdict)
    console.print(table)
    for outcome in outcomes:
        if outcome.problem:
            console.print(f"{outcome.kernel}: {outcome.problem}", highlight=False, markup=False)


def show_chips(console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("chip")
    table.add_column("GB/s", justify="right")
    table.add_column("FP32 TFLOPS", justify="right")
    table.add_column("sources", overflow="fold")
    for chip in CHIPS.values():
        marked = [
            f"{figure.value:g}{_mark(figure.official)}" for figure in (chip.bandwidth, chip.tflops)
        ]
        table.add_row(chip.name, *marked, f"{chip.bandwidth.source}\n{chip.tflops.source}")
    console.print(table)
    console.print("* not stated by Apple", highlight=False)


def _mark(official: bool) -> str:
    return "" if official else "*"
