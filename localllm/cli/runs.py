"""`localllm runs`: the fine-tuning runs on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from localllm.train.runs import Run

runs = typer.Typer(help="List, show, compare and delete fine-tuning runs.", rich_markup_mode=None)

Name = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's name or folder; `last` is the newest.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the losses as .png or .svg (needs matplotlib)."),
]


@runs.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_runs()


@runs.command(name="list")
def list_runs(json_out: Json = False) -> None:
    """List the runs, newest first."""
    from localllm.train.runs import all_runs

    found = all_runs()
    if json_out:
        print(json.dumps([_facts(run) for run in found], ensure_ascii=False))
        return
    if not found:
        print("no runs yet; `localllm finetune` makes one")
        return
    header = ("NAME", "STATUS", "MODEL", "METHOD", "STEP", "LOSS", "VALID", "CREATED")
    rows = [header, *(_row(run) for run in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())


@runs.command()
def show(run: Name = "last", plot: Plot = None, json_out: Json = False) -> None:
    """Show one run: how far it came, its losses as a curve, its last sample answers."""
    from localllm.train.plots import save_plot
    from localllm.train.runs import open_run

    found = open_run(run)
    curves = _curves(found)
    if plot is not None:
        save_plot(plot, curves, title=f"{found.name}: {found.facts.get('model', '')}")
    if json_out:
        evals = found.lines("eval")
        print(json.dumps({**_facts(found), "evals": evals}, ensure_ascii=False))
        return
    print("\n".join(_lines(found, curves)))
    if plot is not None:
        print(f"\nthe plot is in {plot}")


@runs.command()
def compare(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN RUN …", help="Names or folders of runs.")
    ],
    plot: Plot = None,
    json_out: Json = False,
) -> None:
    """Compare runs: the settings that differ, their losses, one chart of all."""
    from localllm.train.config import flat, load_config
    from localllm.train.plots import braille, save_plot
    from localllm.train.runs import open_run

    found = [open_run(name) for name in names]
    settings = [flat(load_config(run.config)) for run in found]
    differing = {
        key: [setting[key] for setting in settings]
        for key in settings[0]
        if key != "out" and any(setting[key] != settings[0][key] for setting in settings)
    }
    curves = {
        run.name: points for run in found for kind, points in _curves(run).items() if kind == "loss"
    }
    if plot is not None:
        save_plot(plot, curves, title="loss")
    if json_out:
        facts = {"runs": [_facts(run) for run in found], "differing": differing}
        print(json.dumps(facts, ensure_ascii=False))
        return
    rows = [("", *(run.name for run in found))]
    rows += [(key, *(_cell(value) for value in values)) for key, values in differing.items()]
    for label, key in (("status", "status"), ("steps", "step"), ("loss", "loss")):
        rows.append((label, *(_cell(_facts(run).get(key)) for run in found)))
    rows.append(("validation loss", *(_cell(run.facts.get("valid_loss")) for run in found)))
    rows.append(("best", *(_cell(run.facts.get("best_loss")) for run in found)))
    rows.append(("seconds", *(_cell(run.facts.get("seconds")) for run in found)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
    print("\n".join(["", *braille(curves)]))


@runs.command()
def delete(
    names: Annotated[list[str], typer.Argument(metavar="RUN …", help="Names or folders of runs.")],
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Delete all but what was trained.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete runs: checkpoints, metrics and, unless told otherwise, what they trained."""
    from localllm.hub.progress import human_bytes
    from localllm.train.runs import delete_run, open_run

    found = [open_run(name) for name in names]  # all there before any is touched
    for run in found:
        what = "checkpoints and metrics" if keep_adapter else "run and adapter"
        if not yes and not typer.confirm(f"delete the {what} of {run.name} in {run.folder}?"):
            continue
        freed = delete_run(run, keep_adapter=keep_adapter)
        print(f"deleted {run.name}, {human_bytes(freed)} freed")


def _facts(run: Run) -> dict[str, Any]:
    return {**run.facts, "name": run.name, "folder": str(run.folder), "status": run.status}


def _row(run: Run) -> tuple[str, ...]:
    facts = run.facts
    step = f"{facts.get('step', 0)}/{facts.get('steps', '?')}"
    return (
        run.name,
        run.status,
        str(facts.get("model", "")),
        str(facts.get("method", "")),
        step,
        _cell(facts.get("loss")),
        _cell(facts.get("valid_loss")),
        str(facts.get("created", ""))[:16].replace("T", " "),
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _curves(run: Run) -> dict[str, list[tuple[float, float]]]:
    def points(kind: str) -> list[tuple[float, float]]:
        lines: list[Mapping[str, Any]] = [*run.lines(kind)]
        return [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]

    return {
        name: found
        for name, found in (("loss", points("step")), ("validation", points("eval")))
        if found
    }


def _lines(run: Run, curves: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    from localllm.hub.progress import human_bytes
    from localllm.train.plots import braille

    facts = run.facts
    peak = facts.get("peak_bytes")
    yield f"{run.name}  {run.status}"
    if facts.get("reason"):
        yield f"  {facts['reason']}"
    if run.status == "killed":
        yield "  its process was killed (the system does so where memory runs out) or crashed"
    if run.status in ("killed", "interrupted"):
        yield f"  go on with: localllm finetune --resume {run.name}"
    told = (
        ("model", facts.get("model")),
        ("method", facts.get("method")),
        ("folder", run.folder),
        ("steps", f"{facts.get('step', 0)} of {facts.get('steps', '?')}"),
        ("loss", facts.get("loss")),
        ("validation loss", facts.get("valid_loss")),
        ("best", _best(facts)),
        ("tokens", facts.get("tokens")),
        ("seconds", facts.get("seconds")),
        ("peak memory", human_bytes(peak) if isinstance(peak, int) else None),
    )
    for name, value in told:
        if value is not None:
            yield f"  {name:<16}{_cell(value)}"
    yield ""
    yield from braille(curves)
    samples = run.lines("samples")
    if samples:
        yield ""
        yield f"answers after step {samples[-1].get('step')}:"
        for answer in samples[-1].get("answers", []):
            yield f"  > {answer.get('prompt')}"
            yield f"  {answer.get('answer')}"


def _best(facts: Mapping[str, Any]) -> str | None:
    if facts.get("best_loss") is None:
        return None
    return f"{facts['best_loss']:.4g} after step {facts.get('best_step')}"
