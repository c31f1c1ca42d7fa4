"""From a file to the first token, and how much memory a loaded model takes.

    python -m benchmarks.load_and_memory [--rounds 5] [--json FILE]

Each round is a fresh Python that imports localllm, loads the model through `LLM` with its weights
packed before (a first run, not counted, leaves them so) and takes one token. Load counts from the
call of `LLM` to the token; the start of Python and the imports are shown beside it.
Memory is what the process holds after a prompt of 1,024 tokens, mapped files included, against
1.25 x the model's file + the KV cache of those tokens + 60 MB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.machine import print_heading
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from localllm import hub

LOAD = Goal(0.5, below=True)
PROMPT = 1024
OVERHEAD, FACTOR = 60e6, 1.25
CHILD = """
import json, re, sys, time

from localllm import LLM, SamplingParams
imported, start = time.perf_counter(), time.time()
model = LLM(sys.argv[1], offline=True)
one = SamplingParams(temperature=0, max_tokens=1)
loaded = time.perf_counter()
model.generate([1000], one)
first = time.perf_counter()
model.generate([1000 + i % 997 for i in range(int(sys.argv[2]))], one)
status = open("/proc/self/status").read() if sys.platform == "linux" else ""
sizes = {name: int(kb) * 1024 for name, kb in re.findall(r"(\\w+):\\s+(\\d+) kB", status)}
attention = [layer.mixer for layer in model.spec.layers]
values = sum(2 * mixer.kv_heads * mixer.head_dim for mixer in attention)
print(json.dumps({
    "start": start, "load": loaded - imported, "token": first - loaded,
    "resident": sizes.get("VmRSS"), "peak": sizes.get("VmHWM"), "kv": 2 * values,
    "backend": model.info.backend,
}))
"""


@dataclass(frozen=True)
class Row:
    """Seconds and bytes. start: Python and the imports; memory is None where none is told."""

    model: str
    backend: str
    start: float
    load: float
    token: float
    resident: int | None
    peak: int | None
    limit: float


def once(path: Path) -> dict[str, float]:
    before = time.time()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(PROMPT)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"loading {path.name} failed:\n{done.stderr}")
    after = time.time()
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    answer["whole"] = after - before
    answer["start"] -= before
    return answer


def measure(name: str, rounds: int) -> Row:
    path = hub.resolve(name).path
    once(path)  # packs the weights and fills the file cache
    answers = [once(path) for _ in range(rounds)]

    def median(key: str) -> float:
        return statistics.median(answer[key] for answer in answers)

    told = answers[0]["resident"] is not None
    return Row(
        name,
        str(answers[0]["backend"]),
        median("start"),
        median("load"),
        median("token"),
        int(median("resident")) if told else None,
        int(median("peak")) if told else None,
        FACTOR * path.stat().st_size + answers[0]["kv"] * PROMPT + OVERHEAD,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_heading()
    rows = [measure(name, args.rounds) for name in ("smollm2:135m", "gemma3:270m")]
    print(f"medians of {args.rounds} fresh processes\n")
    header = ("model", "python, imports", "load", "first token", "load to token")
    shown = []
    for row in rows:
        goal, taken = LOAD if row.model == "smollm2:135m" else None, row.load + row.token
        seconds = (row.start, row.load, row.token, taken)
        shown.append([row.model, *(f"{part:.2f} s" for part in seconds)])
        shown[-1] += [wanted(goal, "s"), verdict(taken, goal)]
    print(markdown((*header, "wanted", "reached"), shown))
    shown = []
    for row in rows:
        if row.resident is None:
            print("\nmemory: not measured: this system does not tell it")
            break
        goal = Goal(row.limit / 1e6, below=True)
        sizes = (row.resident / 1e6, (row.peak or 0) / 1e6)
        shown.append([row.model, *(f"{size:.0f} MB" for size in sizes)])
        shown[-1] += [f"< {goal.value:.0f} MB", verdict(sizes[0], goal)]
    else:
        print("\n" + markdown(("model", "resident", "peak", "wanted", "reached"), shown))
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
