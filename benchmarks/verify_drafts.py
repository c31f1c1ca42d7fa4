"""What verifying draft tokens costs: a step over drafts + 1 rows against a step of one row.

    python -m benchmarks.verify_drafts [--peers FOLDER] [--rounds 7] [--json FILE]

Wanted: 4 drafts in less than 1.35 x the time of one token. llama.cpp is shown beside it where it
is installed (see cpu_vs_llamacpp.py), with flash attention as it chooses itself.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.llamacpp import LlamaCpp, PeerMissing
from benchmarks.harness.machine import print_heading
from benchmarks.harness.ours import Ours
from benchmarks.harness.side import Side
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from benchmarks.harness.timing import take_turns
from benchmarks.harness.worker import Worker
from localllm import hub

CONTEXT, STEPS = 128, 16
DRAFTS = (1, 2, 4, 8)
GOALS = {4: Goal(1.35, below=True)}


@dataclass(frozen=True)
class Row:
    """Seconds of a step; `times`: over a step of one row of the same side."""

    model: str
    side: str
    threads: int
    drafts: int
    seconds: float
    times: float


def measure(name: str, threads: int, rounds: int) -> list[Row]:
    path = hub.resolve(name).path
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for factory in (Ours, LlamaCpp):
            try:
                worker = Worker(factory, path, threads=threads, context=512, sequences=1)
            except PeerMissing as error:
                print(f"llama.cpp: not measured: {error}")
                continue
            sides[factory.name] = stack.enter_context(worker)
        turns = {
            (label, drafts): (side, lambda side, d=drafts: side.verify(d, CONTEXT, STEPS))
            for drafts in (0, *DRAFTS)
            for label, side in sides.items()
        }
        taken = {key: timing.median for key, timing in take_turns(turns, rounds).items()}
    return [
        Row(name, side, threads, drafts, taken[side, drafts], taken[side, drafts] / taken[side, 0])
        for side in sides
        for drafts in DRAFTS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="see LOCALLLM_PEERS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.peers:
        os.environ["LOCALLLM_PEERS"] = str(args.peers)
    print_heading()
    rows = [
        row
        for name in ("smollm2:135m", "gemma3:270m")
        for threads in args.threads
        for row in measure(name, threads, args.rounds)
    ]
    header = ("model", "side", "threads", "drafts", "ms", "of one token", "wanted", "reached")
    shown = []
    for row in rows:
        goal = GOALS.get(row.drafts) if row.side == Ours.name else None
        shown.append(
            [
                row.model,
                row.side,
                str(row.threads),
                str(row.drafts),
                f"{row.seconds * 1e3:.2f}",
                f"{row.times:.2f} x",
                wanted(goal),
                verdict(row.times, goal),
            ]
        )
    print(f"medians of {args.rounds} rounds in turn\n")
    print(markdown(header, shown))
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
