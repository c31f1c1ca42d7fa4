"""What drawing tokens costs: 32 rows of a real model's logits, against the step that makes them.

    python -m benchmarks.sampler [--rounds 9] [--json FILE]

Rows are SmolLM2's logits after 32 places of an English text. Wanted: less than 5 % of a decoding
step of 32 sequences with two threads, measured in the same run. NumPy alone, which decides what the
native sampler leaves open, is shown beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.harness.machine import print_heading
from benchmarks.harness.ours import Ours
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from localllm import LLM, SamplingParams, hub
from localllm.sampling import Sampler, Vocabulary, batch, compile_constraint, draw_batch, noise

MODEL = "smollm2:135m"
ROWS, CALLS = 32, 20
GOAL = Goal(0.05, below=True)
TEXT = (
    "The harbour lay quiet in the early light. Three boats had come in before dawn, and their "
    "crews were already at work on the nets, which had to be dry by noon. Nobody spoke much; "
    "the price of fish had fallen again, and what there was to say about it had been said."
)
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.7, top_k 40, top_p 0.9": {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    "the same, repetition_penalty 1.1": {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
    },
    "temperature 1": {},
    "temperature 1, min_p 0.05": {"min_p": 0.05},
    "temperature 1, top_p 0.95": {"top_p": 0.95},
    "temperature 0.7, typical_p 0.9": {"temperature": 0.7, "typical_p": 0.9},
    "min_p 0.05, XTC 0.5": {"min_p": 0.05, "xtc_probability": 0.5},
    "mirostat 2": {"mirostat": 2},
    "DRY 0.8, min_p 0.05": {"dry_multiplier": 0.8, "dry_sequence_breakers": (), "min_p": 0.05},
    "greedy, JSON": {"temperature": 0.0, "json_object": True},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
}


@dataclass(frozen=True)
class Row:
    """Seconds of a draw for all rows. share: of a step."""

    settings: str
    seconds: float
    share: float
    numpy_seconds: float


def seconds(wish: dict[str, Any], logits: np.ndarray, vocabulary: Vocabulary, calls: int) -> float:
    params = SamplingParams(seed=1, max_tokens=None, **wish)
    constraint = compile_constraint(params, vocabulary)
    prompt = np.random.default_rng(0).integers(0, logits.shape[1], 300).tolist()
    samplers = [
        Sampler(
            params,
            prompt,
            logits.shape[1],
            vocabulary.eos_ids,
            None if constraint is None else constraint.fork(),
        ).fork(seed=row)
        for row in range(len(logits))
    ]
    fresh, taken = np.empty_like(logits), []
    for position in range(calls):
        np.copyto(fresh, logits)  # as a step leaves them
        start = time.perf_counter()
        draw_batch(samplers, fresh, [position] * len(samplers))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_heading()
    with ExitStack() as stack:
        llm = stack.enter_context(LLM(MODEL, threads=2, context=512, kv_tokens=512))
        tokenizer = llm.tokenizer
        assert tokenizer is not None
        logits = llm.logits(tokenizer.encode(TEXT))[-ROWS:]
        vocabulary = Vocabulary(
            tokenizer.all_token_bytes(), tokenizer.eos_ids, tokenizer.special_ids, tokenizer.encode
        )
    ours = Ours(hub.resolve(MODEL).path, threads=2, context=32, sequences=ROWS)
    steps, drawn = [], {name: [] for name in SETTINGS}
    for _ in range(args.rounds):
        steps.append(statistics.median(ours.batch(ROWS, 128, CALLS)))
        for name, wish in SETTINGS.items():
            drawn[name].append(seconds(wish, logits, vocabulary, CALLS))
    ours.close()
    step = statistics.median(steps)
    rows = []
    for name, wish in SETTINGS.items():
        missing = {"native_module": lambda: None}
        with patch.multiple(batch, **missing), patch.multiple(noise, **missing):
            alone = seconds(wish, logits, vocabulary, 3)
        taken = statistics.median(drawn[name])
        rows.append(Row(name, taken, taken / step, alone))
    print(f"\na step of {ROWS} sequences: {step * 1e3:.2f} ms, median of {args.rounds} rounds\n")
    header = (f"{ROWS} rows", "ms", "of a step", "wanted", "reached", "NumPy alone, ms")
    shown = [
        [
            row.settings,
            f"{row.seconds * 1e3:.3f}",
            f"{row.share:.1%}",
            wanted(GOAL, ""),
            verdict(row.share, GOAL),
            f"{row.numpy_seconds * 1e3:.1f}",
        ]
        for row in rows
    ]
    print(markdown(header, shown))
    write_json(args.json, rows, step=step)


if __name__ == "__main__":
    main()
