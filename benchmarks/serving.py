"""Requests of mixed lengths that arrive at once: our engine against llama.cpp.

    python -m benchmarks.serving [--peers FOLDER] [--rounds 5] [--threads 1 2] [--json FILE]

32 requests on SmolLM2-135M: prompts of 16 to 1,024 tokens, answers of 16 to 256, greedy; tokens/s
of prompts and answers together. llama.cpp is driven as its own server does it: one context with a
sequence for each request, one row for each that decodes and the rest of 512 rows for prompts, and
NumPy's argmax. Ours is `LLM.generate`: scheduling, sampling, detokenization and all.
Wanted: 2 x. Also of this run: the KV positions reserved but unused (wanted: under 4 %).
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.machine import print_heading
from benchmarks.harness.side import token_ids
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from benchmarks.harness.timing import take_turns
from benchmarks.harness.worker import Worker
from localllm import LLM, SamplingParams, hub
from scripts.parity.llamacpp import LlamaCpp, PeerMissing

MODEL, REQUESTS, CONTEXT = "smollm2:135m", 32, 1280
SPEED, WASTE = Goal(2.0), Goal(0.04, below=True)


def requests() -> list[tuple[list[int], int]]:
    """Prompts and the lengths of their answers: the same for both sides."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, 1025, REQUESTS), rng.integers(16, 257, REQUESTS)
    return [
        (list(token_ids(1000 * i, int(prompt))), int(answer))
        for i, (prompt, answer) in enumerate(zip(*lengths, strict=True))
    ]


class Ours:
    name = "localllm"

    def __init__(self, threads: int, speculation: str = "off") -> None:
        self._llm = LLM(MODEL, threads=threads, kv_tokens=REQUESTS * CONTEXT, context=2048)
        self._speculation = speculation

    def run(self) -> list[float]:
        work = requests()
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=answer,
                ignore_eos=True,
                speculation=self._speculation,  # type: ignore[arg-type]
            )
            for _, answer in work
        ]
        start = time.perf_counter()
        self._llm.generate([prompt for prompt, _ in work], params, reuse=False)
        return [time.perf_counter() - start]

    def waste(self) -> float:
        """Of the KV positions in blocks held, those without a token, over all steps."""
        engine, held, used = self._llm._model.engine, 0, 0
        step = engine.step

        def watched() -> Any:
            nonlocal held, used
            events = step()
            for sequence in engine.scheduler.running:
                held += sequence.table.blocks * engine.cache.block_size
                used += sequence.computed
            return events

        engine.step = watched  # type: ignore[method-assign]
        self.run()
        engine.step = step  # type: ignore[method-assign]
        return 1 - used / held

    def pause(self) -> None: ...

    def close(self) -> None:
        self._llm.close()


class Theirs:
    name = "llama.cpp"

    def __init__(self, threads: int) -> None:
        path = hub.resolve(MODEL).path
        self._library = LlamaCpp(path, threads=threads, context=CONTEXT, sequences=REQUESTS)

    def run(self) -> list[float]:
        work = requests()
        start = time.perf_counter()
        self._library.clear()
        tokens = [list(prompt) for prompt, _ in work]
        done = [0] * len(work)
        while True:
            rows: list[tuple[int, int, int, bool]] = []
            left = [len(t) < len(p) + n for t, (p, n) in zip(tokens, work, strict=True)]
            if not any(left):
                return [time.perf_counter() - start]
            active = sorted((i for i in range(len(work)) if left[i]), key=lambda i: done[i] == 0)
            for i in active:
                count = min(len(tokens[i]) - done[i], 512 - len(rows))
                last = done[i] + count == len(tokens[i])
                rows += [
                    (tokens[i][done[i] + j], done[i] + j, i, last and j == count - 1)
                    for j in range(count)
                ]
                done[i] += count
            drawing = [sequence for _, _, sequence, wants in rows if wants]
            for sequence, token in zip(
                drawing, self._library.step(rows).argmax(axis=1), strict=True
            ):
                tokens[sequence].append(int(token))

    def pause(self) -> None:
        self._library.pause()

    def close(self) -> None:
        self._library.close()


@dataclass(frozen=True)
class Row:
    threads: int
    side: str
    tokens_per_second: float
    times: float | None  # ours over theirs
    spread: float


def measure(threads: int, rounds: int) -> tuple[list[Row], float]:
    total = sum(len(prompt) + answer for prompt, answer in requests())
    with ExitStack() as stack:
        ours = stack.enter_context(Worker(Ours, threads))
        sides: dict[str, Any] = {"localllm": ours}
        try:
            sides["llama.cpp"] = stack.enter_context(Worker(Theirs, threads))
        except PeerMissing as error:
            print(f"llama.cpp: not measured: {error}")
        timings = take_turns({k: (side, lambda s: s.run()) for k, side in sides.items()}, rounds)
        waste = ours.waste()
    speed = {name: total / timing.median for name, timing in timings.items()}
    peer = speed.get("llama.cpp")
    rows = [
        Row(threads, name, speed[name], None if peer is None else speed[name] / peer, t.spread)
        for name, t in timings.items()
    ]
    return rows, waste


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="see LOCALLLM_PEERS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.peers:
        os.environ["LOCALLLM_PEERS"] = str(args.peers)
    print_heading()
    results = [measure(threads, args.rounds) for threads in args.threads]
    rows = [row for found, _ in results for row in found]
    lines = []
    for row in rows:
        mine = row.side == "localllm"
        ratio = "-" if row.times is None or not mine else f"{row.times:.2f} x"
        goal = SPEED if mine else None
        lines.append(
            [
                row.side,
                str(row.threads),
                f"{row.tokens_per_second:.0f}",
                ratio,
                wanted(goal),
                verdict(row.times, goal),
                f"{row.spread:.2f}",
            ]
        )
    header = ["side", "threads", "tokens/s", "ratio", "wanted", "reached", "spread"]
    print(markdown(header, lines))
    waste = results[0][1]
    print(
        f"\nKV positions reserved and unused: {waste:.1%} (wanted {wanted(WASTE, '')}: "
        f"{verdict(waste, WASTE)})"
    )
    write_json(args.json, rows, waste=waste)


if __name__ == "__main__":
    main()
