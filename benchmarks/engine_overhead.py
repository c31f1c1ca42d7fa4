"""What the engine adds to a step: drafting, scheduling and sampling for 32 sequences.

    python -m benchmarks.engine_overhead [--threads N] [--json FILE]

SmolLM2-135M, 32 sequences of 64 prompt tokens that decode 64 more. The engine's own event stream
gives each step's seconds, in the model and in all; medians over the steps in which all decode.
Wanted: under 5 % of the step.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import print_heading
from benchmarks.harness.side import token_ids
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from localllm import LLM, SamplingParams
from localllm.engine.events import StepDone

MODEL, SEQUENCES, PROMPT, ANSWER = "smollm2:135m", 32, 64, 64
GOAL = Goal(0.05, below=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 0.7, top_k 40, top_p 0.9": {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    "temperature 1": {"temperature": 1.0},
}


@dataclass(frozen=True)
class Row:
    sampling: str
    model_seconds: float
    added_seconds: float
    share: float


def measure(llm: LLM, name: str) -> Row:
    watch = llm.watch(capacity=100_000)
    params = SamplingParams(
        max_tokens=ANSWER, ignore_eos=True, seed=1, speculation="off", **SETTINGS[name]
    )
    llm.generate([list(token_ids(1000 * i, PROMPT)) for i in range(SEQUENCES)], params, reuse=False)
    llm.unwatch(watch)
    steps = [
        event
        for event in watch.take()
        if isinstance(event, StepDone)
        and len(event.batch) == SEQUENCES
        and all(row.kind == "decode" for row in event.batch)
    ]
    model = statistics.median(step.model_seconds for step in steps)
    added = statistics.median(step.total_seconds - step.model_seconds for step in steps)
    return Row(name, model, added, added / (model + added))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_heading()
    with LLM(MODEL, threads=args.threads) as llm:
        measure(llm, "greedy")
        rows = [measure(llm, name) for name in SETTINGS]
    lines = [
        [
            row.sampling,
            f"{1000 * row.model_seconds:.2f} ms",
            f"{1000 * row.added_seconds:.2f} ms",
            f"{row.share:.1%}",
            wanted(GOAL, ""),
            verdict(row.share, GOAL),
        ]
        for row in rows
    ]
    print(markdown(["sampling", "model", "added", "share", "wanted", "reached"], lines))
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
