"""Two threads while another process keeps one processor busy, each processor in turn.

    python -m benchmarks.busy_neighbour [--rounds 5] [--peer] [--json FILE]

Wanted: never below 0.8 x what one thread makes on the undisturbed machine. The neighbour is an
endless loop pinned to one processor. A rate is tokens over the whole time of a round, so that
stalls count, and the slowest round is judged. `--peer` shows llama.cpp with 2 threads beside it.
Linux only: macOS has no pinning.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.llamacpp import LlamaCpp, PeerMissing
from benchmarks.harness.machine import print_heading
from benchmarks.harness.ours import Ours
from benchmarks.harness.side import Side
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from benchmarks.harness.timing import Measure
from benchmarks.harness.worker import Worker
from localllm import hub

THREADS = 2
GOAL = Goal(0.8)
WORKS: dict[str, tuple[int, Measure]] = {
    "decode at 128": (1, lambda side: side.decode(128, 48)),
    "prefill of 512": (512, lambda side: side.prefill(512)),
    "decode of 8 sequences": (8, lambda side: side.batch(8, 128, 16)),
}
PEER_WORKS = ("decode at 128", "prefill of 512")


@dataclass(frozen=True)
class Row:
    """Tokens a second. alone: one thread of ours, no neighbour. share: slowest / alone."""

    side: str
    work: str
    busy: int | None
    alone: float
    median: float
    slowest: float
    share: float


@contextmanager
def neighbour(processor: int | None) -> Iterator[None]:
    """A process that keeps this processor busy; none for None."""
    if processor is None:
        yield
        return
    code = f"import os\nos.sched_setaffinity(0, {{{processor}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def rates(side: Side, work: str, rounds: int) -> list[float]:
    """Tokens a second of each round, after one for warmth."""
    tokens, measure = WORKS[work]
    measure(side)
    found = []
    for _ in range(rounds):
        seconds = measure(side)
        found.append(tokens * len(seconds) / sum(seconds))
    side.pause()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="llama.cpp with 2 threads too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if sys.platform != "linux":
        print("not measured: this system cannot pin a process to a processor")
        return
    print_heading()
    path = hub.resolve(args.model).path
    size = {"context": 768, "sequences": 8}
    with Worker(Ours, path, threads=1, **size) as side:
        alone = {work: statistics.median(rates(side, work, args.rounds)) for work in WORKS}
    rows = []
    with ExitStack() as stack:
        sides = {Ours.name: stack.enter_context(Worker(Ours, path, threads=THREADS, **size))}
        if args.peer:
            try:
                peer = Worker(LlamaCpp, path, threads=THREADS, context=768)
                sides[LlamaCpp.name] = stack.enter_context(peer)
            except PeerMissing as error:
                print(f"llama.cpp: not measured: {error}")
        for busy in (None, *sorted(os.sched_getaffinity(0))):
            with neighbour(busy):
                for name, side in sides.items():
                    for work in WORKS if name == Ours.name else PEER_WORKS:
                        found = rates(side, work, args.rounds)
                        slowest, base = min(found), alone[work]
                        middle = statistics.median(found)
                        rows.append(Row(name, work, busy, base, middle, slowest, slowest / base))
    header = ("work", "side", "busy", "1 thread alone", f"{THREADS} threads", "slowest round")
    shown = []
    for row in rows:
        goal = GOAL if row.side == Ours.name else None
        shown.append(
            [
                row.work,
                row.side,
                "none" if row.busy is None else f"processor {row.busy}",
                f"{row.alone:.0f}",
                f"{row.median:.0f}",
                f"{row.slowest:.0f}",
                f"{row.share:.2f} x",
                wanted(goal),
                verdict(row.share, goal),
            ]
        )
    print(f"\ntok/s, {args.rounds} rounds; the last columns judge the slowest round\n")
    print(markdown((*header, "of 1 thread", "wanted", "reached"), shown))
    write_json(args.json, rows, threads=THREADS)


if __name__ == "__main__":
    main()
