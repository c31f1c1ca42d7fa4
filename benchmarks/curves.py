"""Tokens a second by context length and by batch, both sides, as a picture and as numbers.

    python -m benchmarks.curves [--peers FOLDER] [--rounds 3] [--model NAME] [--threads N]

Writes docs/speed.png and docs/speed.csv. Needs the extra `bench` (matplotlib). llama.cpp
has a line with flash attention and one without; where it is missing, this engine stands alone.
"""

from __future__ import annotations

import argparse
import csv
import os
from contextlib import ExitStack
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from benchmarks.harness.llamacpp import LlamaCpp, PeerMissing
from benchmarks.harness.machine import describe, print_heading
from benchmarks.harness.ours import Ours
from benchmarks.harness.side import Side
from benchmarks.harness.timing import alternate
from benchmarks.harness.worker import Worker
from localllm import hub

CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16, 32)
BATCH_CONTEXT = 128
DOCS = Path(__file__).resolve().parents[1] / "docs"
PLAIN, FLASH = "llama.cpp", "llama.cpp, flash attention"
SIDES = (
    (Ours.name, Ours, {}),
    (PLAIN, LlamaCpp, {"flash_attention": "off"}),
    (FLASH, LlamaCpp, {"flash_attention": "on"}),
)
COLOURS = {Ours.name: "#1f6feb", PLAIN: "#d4731c", FLASH: "#8a6d3b"}


@dataclass(frozen=True)
class Point:
    """by: "context" or "batch"; rate: tokens a second, all sequences together."""

    side: str
    by: str
    at: int
    rate: float


def points(path: Path, threads: int, by: str, rounds: int) -> list[Point]:
    """One curve of each side."""
    batched = by == "batch"
    size = {
        "context": max(CONTEXTS) + 64,
        "sequences": max(BATCHES) if batched else 1,
    }
    found = []
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name, factory, settings in SIDES:
            try:
                worker = Worker(factory, path, threads=threads, **size, **settings)
            except PeerMissing as error:
                print(f"{name}: not measured: {error}")
                continue
            sides[name] = stack.enter_context(worker)
            print(f"{name}: {worker.about()}", flush=True)
        for at in BATCHES if batched else CONTEXTS:

            def measure(side: Side, at: int = at) -> list[float]:
                return side.batch(at, BATCH_CONTEXT, 8) if batched else side.decode(at, 12)

            for name, timing in alternate(sides, measure, rounds).items():
                found.append(Point(name, by, at, (at if batched else 1) / timing.median))
                print(f"{name}, {by} {at}: {found[-1].rate:.1f} tok/s", flush=True)
    return found


def draw(found: list[Point], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    labels = {"context": "positions in the context", "batch": "sequences decoded together"}
    for axis, (by, label) in zip(axes, labels.items(), strict=True):
        for side, colour in COLOURS.items():
            line = [(p.at, p.rate) for p in found if (p.side, p.by) == (side, by)]
            if line:
                axis.plot(*zip(*line, strict=True), "o-", color=colour, label=side, markersize=4)
        ticks = CONTEXTS if by == "context" else BATCHES
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_ylim(bottom=0)
        axis.set_xlabel(label)
        axis.set_ylabel("tokens/s")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="see LOCALLLM_PEERS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=DOCS / "speed.png", help="the picture")
    args = parser.parse_args()
    if args.peers:
        os.environ["LOCALLLM_PEERS"] = str(args.peers)
    print_heading()
    path = hub.resolve(args.model).path
    found = [
        point
        for by in ("context", "batch")
        for point in points(path, args.threads, by, args.rounds)
    ]
    table = args.out.with_suffix(".csv")
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([field.name for field in fields(Point)])
        writer.writerows((*astuple(point)[:3], f"{point.rate:.1f}") for point in found)
    title = f"{args.model}, {args.threads} thread(s), {describe()['machine']}"
    draw(found, title, args.out)
    print(f"wrote {args.out} and {table}")


if __name__ == "__main__":
    main()
