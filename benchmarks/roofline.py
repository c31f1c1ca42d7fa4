"""What a decoded token costs by layer, against the time its weights need to come from memory.

    python -m benchmarks.roofline [--rounds 5] [--kernels NAME] [--json FILE]

The same model is run whole and with a third of its layers left out, in turn; the difference is what
those layers cost, the rest is the head, the sampling of one row and the call itself. The
roofline is the bytes of the file's weights over the read bandwidth measured in the same run. The
context is short (128 positions), so that the weights are what is read.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.bytes_read import bytes_read
from benchmarks.harness.machine import print_heading, read_bandwidth
from benchmarks.harness.one_billion import one_billion
from benchmarks.harness.ours import Ours
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from benchmarks.harness.timing import alternate
from benchmarks.harness.worker import Worker
from localllm import hub

CONTEXT, STEPS = 128, 16
GOAL = Goal(0.9)  # of the read bandwidth, for the large model


@dataclass(frozen=True)
class Row:
    """Seconds, and bytes a second. share: the time at the roofline over the time taken."""

    model: str
    threads: int
    token: float
    bandwidth: float
    share: float
    layer: float
    layer_share: float
    rest: float
    rest_share: float


def measure(name: str, path: Path, threads: int, args: argparse.Namespace) -> Row:
    weights = bytes_read(path)
    kept = weights.layers - weights.layers // 3
    with ExitStack() as stack:
        sides = {
            label: stack.enter_context(
                Worker(
                    Ours,
                    path,
                    threads=threads,
                    context=CONTEXT + 64,
                    sequences=0,
                    kernels=args.kernels,
                    layers=layers,
                )
            )
            for label, layers in (("whole", None), ("part", kept))
        }
        before = read_bandwidth(threads)
        timings = alternate(sides, lambda side: side.decode(CONTEXT, STEPS), args.rounds)
        bandwidth = statistics.mean((before, read_bandwidth(threads)))
    whole, part = timings["whole"].median, timings["part"].median
    layer = (whole - part) / (weights.layers - kept)
    rest = whole - weights.layers * layer
    return Row(
        name,
        threads,
        token=whole,
        bandwidth=bandwidth,
        share=weights.token / bandwidth / whole,
        layer=layer,
        layer_share=weights.layer / bandwidth / layer,
        rest=rest,
        rest_share=weights.head / bandwidth / rest,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kernels", help="an instruction set; the best unless told")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_heading()
    print(f"medians of {args.rounds} rounds in turn\n")
    models = {
        "SmolLM2-135M Q4_1": hub.resolve("smollm2:135m").path,
        "Gemma-3-270M Q4_K_M": hub.resolve("gemma3:270m").path,
        "1B shapes Q4_0": one_billion("Q4_0"),
        "1B shapes Q4_1": one_billion("Q4_1"),
    }
    rows = [
        measure(name, path, threads, args)
        for name, path in models.items()
        for threads in args.threads
    ]
    header = (
        *("decode at 128", "threads", "tok/s", "read GB/s", "of roofline", "wanted", "reached"),
        *("us a layer", "of roofline", "us head, rest", "of roofline"),
    )
    shown = []
    for row in rows:
        goal = GOAL if row.model.startswith("1B") else None
        shown.append(
            [
                row.model,
                str(row.threads),
                f"{1 / row.token:.1f}",
                f"{row.bandwidth / 1e9:.1f}",
                f"{row.share:.0%}",
                wanted(goal, ""),
                verdict(row.share, goal),
                f"{row.layer * 1e6:.0f}",
                f"{row.layer_share:.0%}",
                f"{row.rest * 1e6:.0f}",
                f"{row.rest_share:.0%}",
            ]
        )
    print(markdown(header, shown))
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
