"""What an app that draws costs the engine, with and without a core lent for it.

    python -m benchmarks.lent_core [--model smollm2:135m] [--seconds 80] [--work 10] [--every 130]

An engine with a thread for each core answers without end, while this process computes for `--work`
milliseconds out of every `--every`: not at all, unasked, and with a core borrowed as the chat app
borrows one (`tui/engine/cores.py`). The three take turns of 0.4 s, so that a machine whose speed
changes treats them alike. Rates are means of the turns, with their standard errors.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from itertools import pairwise

from benchmarks.harness.machine import print_heading
from localllm.tui.engine.cores import APP, Cores

TURN = 0.4  # seconds
WAYS = ("at rest", "unasked", "borrowed")
ENGINE = """
import json, os, sys, time
from localllm import LLM, SamplingParams
from localllm.tui.engine.__main__ import NICER
from localllm.tui.engine.cores import Cores
os.nice(NICER)
cores = Cores(int(sys.argv[1]))
cores.lend()
times, end = [], time.monotonic() + float(sys.argv[3])
with LLM(sys.argv[2]) as llm:
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, speculation="off")
    while time.monotonic() < end:
        times.append([time.monotonic() for _ in llm.stream("A story about a lighthouse.", params)])
print(json.dumps(times))
"""


def work(seconds: float) -> None:
    """As Python computes, for so long on a processor."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        [str(number) for number in range(200)]


def turn(way: str, cores: Cores, seconds: float, every: float) -> list[float]:
    """How long each piece of work took by the clock."""
    end, taken = time.monotonic() + TURN, []
    due = time.monotonic() + every * random.random()
    while way != "at rest" and due < end:
        time.sleep(max(0.0, due - time.monotonic()))
        began = time.monotonic()
        if way == "borrowed":
            cores.borrow(APP)
        work(seconds)
        cores.give_back(APP)
        taken.append(time.monotonic() - began)
        due += every
    time.sleep(max(0.0, end - time.monotonic()))
    return taken


def rate(answers: list[list[float]], start: float, end: float) -> float | None:
    """Tokens a second between two times; None where most of it is none of an answer."""
    tokens = seconds = 0.0
    for answer in answers:
        for before, after in pairwise(answer):
            shared = min(after, end) - max(before, start)
            if shared > 0:
                tokens += shared / (after - before)
                seconds += shared
    return tokens / seconds if seconds > TURN / 2 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--seconds", type=float, default=80.0)
    parser.add_argument("--work", type=float, default=10.0, help="milliseconds")
    parser.add_argument("--every", type=float, default=130.0, help="milliseconds")
    given = parser.parse_args()
    print_heading()
    cores = Cores()
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(cores.file), given.model, str(given.seconds)],
        stdout=subprocess.PIPE,
        pass_fds=[cores.file],
        text=True,
    )
    turns: list[tuple[str, float, float]] = []
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    end = time.monotonic() + given.seconds
    while time.monotonic() < end:
        for way in random.sample(WAYS, len(WAYS)):
            start = time.monotonic()
            taken[way] += turn(way, cores, given.work / 1000, given.every / 1000)
            turns.append((way, start, time.monotonic()))
    answers = json.loads(engine.communicate()[0])
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for way, start, stop in turns:
        if (found := rate(answers, start, stop)) is not None:
            rates[way].append(found)
    alone = statistics.mean(rates["at rest"])
    for way in WAYS:
        mean = statistics.mean(rates[way])
        error = statistics.stdev(rates[way]) / len(rates[way]) ** 0.5
        line = f"{way}: {mean:.1f} tokens/s, {mean / alone:.3f} +- {error / alone:.3f}"
        if taken[way]:
            line += f"; the work took {1000 * statistics.median(taken[way]):.1f} ms"
        print(line)


if __name__ == "__main__":
    main()
