"""Speed against llama.cpp on the same files: the table of what was wanted and what is reached.

    python -m benchmarks.cpu_vs_llamacpp [--peers FOLDER] [--rounds 5] [--only TEXT] [--json FILE]
                                         [--kernels best|avx2|both]

Both sides run in one go, in turn, each in a process of its own, through their own C++ call for a
step and nothing else: `Decoder.forward` here, `llama_decode` there. 1 thread is compared with 1
thread and 2 with 2. llama.cpp is measured with flash attention on and off, and the better median
counts. It comes prebuilt in node-llama-cpp 3.22.1: `npm install --ignore-scripts --prefix FOLDER
node-llama-cpp@3.22.1`; FOLDER is .venv/peers, or what LOCALLLM_PEERS names, unless told. Without
it only this engine is measured, and the output says so. `--kernels avx2` holds both sides to AVX2;
what is wanted is said of the best kernels alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.llamacpp import LlamaCpp, PeerMissing, libraries
from benchmarks.harness.machine import print_heading
from benchmarks.harness.one_billion import one_billion
from benchmarks.harness.ours import Ours
from benchmarks.harness.side import Side
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from benchmarks.harness.timing import Measure, alternate
from benchmarks.harness.worker import Worker
from localllm import hub

HEADER = (
    *("work", "threads", "localllm", "llama.cpp", "flash"),
    *("ratio", "wanted", "reached", "spread"),
)
PREFILL = 512
STARVED, SCALED = 1.3, 1.9  # 2 threads over 1: too little to be true, and about as good as it gets
BATCH_CONTEXT = 128
SMOLLM2, GEMMA, LARGE = "SmolLM2-135M Q4_1", "Gemma-3-270M Q4_K_M", "1B shapes Q4_0"
MODELS: dict[str, Callable[[], Path]] = {
    SMOLLM2: lambda: hub.resolve("smollm2:135m").path,
    GEMMA: lambda: hub.resolve("gemma3:270m").path,
    LARGE: lambda: one_billion("Q4_0"),
}


@dataclass(frozen=True)
class Work:
    """tokens: how many one step makes; context: positions a side has to hold."""

    model: str
    what: str
    measure: Measure
    tokens: int = 1
    context: int = 1024
    sequences: int = 1
    goal: Goal | None = None


def decode(model: str, at: int, times: float | None, steps: int = 24) -> Work:
    goal = None if times is None else Goal(times)
    return Work(
        model, f"decode at {at}", lambda side: side.decode(at, steps), context=at + 256, goal=goal
    )


def prefill(model: str, times: float) -> Work:
    return Work(
        model,
        f"prefill of {PREFILL}",
        lambda side: side.prefill(PREFILL),
        tokens=PREFILL,
        goal=Goal(times),
    )


def batch(model: str, sequences: int, times: float) -> Work:
    return Work(
        model,
        f"decode of {sequences} sequences",
        lambda side: side.batch(sequences, BATCH_CONTEXT, 12),
        tokens=sequences,
        sequences=sequences,
        goal=Goal(times),
    )


WORKS = (
    decode(SMOLLM2, 128, 1.6),
    decode(SMOLLM2, 4096, 5.0, steps=12),
    prefill(SMOLLM2, 2.3),
    batch(SMOLLM2, 8, 2.2),
    batch(SMOLLM2, 32, 2.2),
    decode(GEMMA, 128, 1.6),
    decode(GEMMA, 4096, None, steps=12),
    prefill(GEMMA, 2.0),
    decode(LARGE, 128, 1.05, steps=8),
)


@dataclass(frozen=True)
class Row:
    """Rates in tokens a second, all sequences together; theirs is None without the peer.

    theirs: the better of `with_flash` and `without_flash` attention.
    """

    kernels: str
    model: str
    work: str
    threads: int
    ours: float
    theirs: float | None
    with_flash: float | None
    without_flash: float | None
    ratio: float | None
    goal: float | None
    spread: float


def sides(work: Work, threads: int, kernels: str, stack: ExitStack) -> dict[str, Side]:
    """Ours, and llama.cpp with flash attention on and off if it is here."""
    model, avx2 = MODELS[work.model](), kernels == "avx2"

    def start(factory: Callable[..., Side], **settings: object) -> Side:
        size = {"context": work.context, "sequences": work.sequences}
        return stack.enter_context(Worker(factory, model, threads=threads, **size, **settings))

    found = {"ours": start(Ours, kernels="avx2" if avx2 else None)}
    if peer_missing() is None:
        variant = "haswell" if avx2 else None
        for flash in ("on", "off"):
            found[flash] = start(LlamaCpp, variant=variant, flash_attention=flash)
    return found


def peer_missing() -> str | None:
    try:
        libraries()
    except PeerMissing as error:
        return str(error)
    return None


def measure(work: Work, threads: int, kernels: str, rounds: int) -> Row:
    with ExitStack() as stack:
        timings = alternate(sides(work, threads, kernels, stack), work.measure, rounds)
    rates = {name: work.tokens / timing.median for name, timing in timings.items()}
    theirs = max((rates[name] for name in ("on", "off") if name in rates), default=None)
    return Row(
        kernels,
        work.model,
        work.what,
        threads,
        ours=rates["ours"],
        theirs=theirs,
        with_flash=rates.get("on"),
        without_flash=rates.get("off"),
        ratio=rates["ours"] / theirs if theirs else None,
        goal=work.goal.value if work.goal and kernels == "best" else None,
        spread=max(timing.spread for timing in timings.values()),
    )


def cells(row: Row, work: Work) -> list[str]:
    goal = None if row.goal is None else work.goal
    flash = "-" if row.theirs is None else "on" if row.theirs == row.with_flash else "off"
    return [
        f"{row.model}, {row.work}",
        str(row.threads),
        f"{row.ours:.1f}",
        "-" if row.theirs is None else f"{row.theirs:.1f}",
        flash,
        "-" if row.ratio is None else f"{row.ratio:.2f} x",
        wanted(goal),
        verdict(row.ratio, goal),
        f"{row.spread:.2f}",
    ]


def doubt(rows: list[Row]) -> list[str]:
    """Threads of llama.cpp that brought little: on a machine with other work they starve."""
    alone = {(row.model, row.work): row for row in rows if row.threads == 1}
    notes = []
    for row in rows:
        one = alone.get((row.model, row.work))
        if row.threads != 2 or one is None or one.theirs is None or row.theirs is None:
            continue
        if row.theirs < STARVED * one.theirs:
            notes.append(
                f"NOTE: {row.model}, {row.work}: 2 threads of llama.cpp made {row.theirs:.1f}, "
                f"1 thread {one.theirs:.1f}. Were it {SCALED} x its 1 thread, the ratio would be "
                f"{row.ours / (SCALED * one.theirs):.2f} x."
            )
    return notes


def announce(kernels: str) -> None:
    """What each side says of itself, at 1 thread."""
    work = WORKS[0]
    with ExitStack() as stack:
        for name, side in sides(work, 1, kernels, stack).items():
            if name != "off":
                print(f"{'localllm' if name == 'ours' else 'llama.cpp'}: {side.about()}")
    if reason := peer_missing():
        print(f"llama.cpp: not measured: {reason}")


def run(args: argparse.Namespace, kernels: str) -> list[Row]:
    print(f"\n## Kernels: {'the best of each side' if kernels == 'best' else 'AVX2 on both'}\n")
    announce(kernels)
    shown, made = [], []
    for work in WORKS:
        if args.only and args.only.lower() not in f"{work.model}, {work.what}".lower():
            continue
        for threads in args.threads:
            row = measure(work, threads, kernels, args.rounds)
            print(f"… {row.model}, {row.work}, {threads} thread(s): {row.ours:.1f}", flush=True)
            made.append(row)
            shown.append(cells(row, work))
    print("\n" + markdown(HEADER, shown))
    print("\n".join(doubt(made)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", "--node-modules", type=Path, help="see LOCALLLM_PEERS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kernels", choices=("best", "avx2", "both"), default="both")
    parser.add_argument("--only", help="only the works whose name has this text")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.peers:
        os.environ["LOCALLLM_PEERS"] = str(args.peers)
    print_heading()
    print(
        f"medians of {args.rounds} rounds in turn, tok/s of all sequences together; flash: "
        "llama.cpp's flash attention, whichever of on and off is faster; spread: the slowest round "
        "of a side over its fastest"
    )
    rows = []
    for kernels in ("best", "avx2") if args.kernels == "both" else (args.kernels,):
        rows += run(args, kernels)
    write_json(args.json, rows, rounds=args.rounds)


if __name__ == "__main__":
    main()
