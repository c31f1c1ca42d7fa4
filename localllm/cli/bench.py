"""`localllm bench`: how fast a model runs here, as a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localllm.cli import options
from localllm.cli.chat import DEFAULT_MODEL

if TYPE_CHECKING:
    from localllm.measure import Report, Row


def bench(
    model: options.Model = DEFAULT_MODEL,
    contexts: Annotated[
        str | None,
        typer.Option(metavar="N,N…", help="Decode at these; 128,1024,4096 unless told."),
    ] = None,
    batches: Annotated[
        str, typer.Option(metavar="N,N…", help="Decode so many sequences at once.")
    ] = "1,8,32",
    prefill: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the prompt; 512 unless told.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of which the median is taken.")] = 7,
    seconds: Annotated[
        float, typer.Option(min=1, help="About how long measuring may take.")
    ] = 60.0,
    json_out: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Measure the Metal kernels against MLX instead of a model."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --kernels: write a report that can be sent."),
    ] = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    activations: options.Activations = None,
    offline: options.Offline = False,
) -> None:
    """Measure a model on this machine: prefill, decode, batches, verifying drafts, memory.

    Rows that take longer than the time allows are left out, and named.
    """
    if kernels:
        from localllm.cli.kernels import bench_kernels

        bench_kernels(json_out, out)
        return
    if out is not None:
        raise typer.BadParameter("--out goes with --kernels", param_hint="--out")
    wanted = None if contexts is None else _numbers("--contexts", contexts)
    together = _numbers("--batches", batches)

    from localllm.cli.progress import pull_progress
    from localllm.measure import Settings, measure

    settings = Settings(
        backend=backend,
        threads=threads,
        activations=activations,  # type: ignore[arg-type]  # checked where it is used
        contexts=wanted,
        batches=together,
        prefill=prefill,
        rounds=rounds,
        seconds=seconds,
        offline=offline or None,
    )
    print(f"measuring for about {seconds:.0f} s at most", file=sys.stderr)
    with pull_progress() as progress:
        report = measure(model, settings, progress)
    if json_out:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        print("\n".join(_lines(report)))
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(
            f"{option} takes whole numbers from 1 on with commas between, as in 128,1024; "
            f"not {text!r}"
        )
    return numbers


def _lines(report: Report) -> Iterator[str]:
    from localllm.hub.progress import human_bytes as size

    engine = [report.backend]
    if report.kernels:
        engine.append(f"{report.kernels} kernels")
    if report.threads:
        engine.append(f"{report.threads} thread{'' if report.threads == 1 else 's'}")
    engine.append(f"{report.activations} activations")
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    loaded, peak, end = (None if n is None else size(n) for n in report.resident)
    yield f"{report.model} on {', '.join(engine)}"
    yield f"{report.processor}, {report.cores[0]} of {report.cores[1]} cores usable; {versions}"
    yield ""
    packed = "packed by an earlier start" if report.from_cache else "read from the model's files"
    yield f"load            {report.load_seconds:.2f} s, weights {packed}"
    yield f"first token     {report.first_token_seconds:.2f} s after the start of loading"
    yield (
        f"memory          weights {size(report.weight_bytes)}, KV {size(report.kv_bytes)} for "
        f"{report.kv_tokens:,} positions"
    )
    if loaded is not None:
        highest = f" ({peak} before)" if peak else ""
        yield f"process         {loaded} resident once loaded{highest}, {end} at the end"
    if report.bandwidth is not None and report.bandwidth_bytes is not None:
        yield (
            f"read bandwidth  {report.bandwidth / 1e9:.1f} GB/s, best of reading "
            f"{size(report.bandwidth_bytes)}"
        )
    yield ""
    rounds = report.rows[0].seconds.rounds
    what = f"median of {rounds} rounds, slowest … fastest" if rounds > 1 else "one round"
    yield f"{'':<28}{'tok/s':>9}  ({what})"
    for row in report.rows:
        yield _table_row(row)
    for left in report.left_out:
        yield f"left out: {left.what}: {left.reason}"
    yield f"measured in {report.seconds:.0f} s"


def _table_row(row: Row) -> str:
    from localllm.hub.progress import human_bytes

    label = {
        "prefill": f"prefill of {row.size:,}",
        "decode": f"decode at {row.context:,}",
        "batch": f"{row.size} at once, at {row.context:,}",
        "verify": f"verify {row.size} drafts at {row.context:,}",
    }[row.work]
    if row.relative is not None:
        return f"{label:<28}{'':>9}  {row.relative:.2f} x a decode step"
    line = f"{label:<28}{row.rate:>9,.1f}"
    if row.seconds.rounds > 1:
        line += f"  ({row.rates[0]:,.1f} … {row.rates[1]:,.1f})"
    if row.share is not None and row.token_bytes is not None:
        line += f"  {row.share:.0%} of the bandwidth, {human_bytes(row.token_bytes)} a token"
    return line
