"""What the prefix cache saves: the second turn of a long chat, from memory and from disk; forks.

    python -m benchmarks.reuse [--rounds 5] [--threads N] [--json FILE]

SmolLM2-135M, a chat of 4,000 tokens whose next message has 20. Time to first token of the second
turn: against the same without any cache (wanted: 20 x less), and in a new engine over the same disk
cache (10 x less; the files are in the system's page cache). Then the time of a fork of the
4,000-token sequence (under 1 ms, 0 bytes copied).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.machine import print_heading
from benchmarks.harness.side import token_ids
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from localllm import hub
from localllm.backend.cpu import CpuBackend
from localllm.checkpoint import open_checkpoint
from localllm.engine import Engine, Request, Token
from localllm.engine.disk_tier import DiskTier
from localllm.models import load_spec, load_weights
from localllm.sampling import SamplingParams

MODEL, LENGTH, MESSAGE, ANSWER = "smollm2:135m", 4000, 20, 32


@dataclass(frozen=True)
class Row:
    work: str
    seconds: float
    times: float | None  # the first row's seconds over these
    goal: Goal | None


class Chat:
    """An engine over its own backend; `disk` is a folder."""

    def __init__(self, threads: int | None, disk: Path | None = None) -> None:
        checkpoint = open_checkpoint(hub.resolve(MODEL).path)
        spec = load_spec(checkpoint)
        weights = load_weights(checkpoint, spec)
        self.backend = CpuBackend(spec, weights, num_blocks=512, threads=threads)
        self.disk = None if disk is None else DiskTier(self.backend, disk, 1 << 30)
        self.engine = Engine(self.backend, context=8192, disk=self.disk, key=b"benchmark")

    def first_token(self, prompt: list[int], *, reuse: bool = True, answer: int = 1) -> float:
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        start = time.perf_counter()
        first = 0.0
        self.engine.add(Request(tuple(prompt), params, reuse=reuse))
        while self.engine.busy:
            for event in self.engine.step():
                if isinstance(event, Token) and not first:
                    first = time.perf_counter() - start
        return first

    def fork(self) -> tuple[float, int]:
        """Seconds of a fork of a running sequence, and the blocks it took."""
        params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
        request_id = self.engine.add(Request(tuple(conversation()), params))
        while self.engine._sequences[request_id].generated < 5:
            self.engine.step()
        before = self.engine.cache.in_use
        start = time.perf_counter()
        child = self.engine.fork(request_id, seed=1)
        seconds, taken = time.perf_counter() - start, self.engine.cache.in_use - before
        for each in (request_id, child):
            self.engine.end(each)
        return seconds, taken

    def close(self) -> None:
        self.engine.close()
        if self.disk is not None:
            self.disk.close()
        self.backend.close()


def conversation() -> list[int]:
    return list(token_ids(0, LENGTH))


def second_turn(round_: int) -> list[int]:
    return [*conversation(), *token_ids(10_000 + 100 * round_, MESSAGE)]


def measure(threads: int | None, rounds: int) -> list[Row]:
    without: list[float] = []
    memory: list[float] = []
    disk: list[float] = []
    forks: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chat = Chat(threads, folder)
        chat.first_token(conversation(), answer=ANSWER)
        for round_ in range(rounds):
            without.append(chat.first_token(second_turn(round_), reuse=False))
            memory.append(chat.first_token(second_turn(round_)))
            seconds, taken = chat.fork()
            assert taken == 0, f"a fork took {taken} blocks"
            forks.append(seconds)
        chat.close()
        for round_ in range(rounds):
            again = Chat(threads, folder)
            disk.append(again.first_token(second_turn(100 + round_)))
            again.close()
    median = statistics.median
    cold = median(without)
    return [
        Row("second turn, no cache", cold, None, None),
        Row("second turn, from memory", median(memory), cold / median(memory), Goal(20)),
        Row("second turn, from disk", median(disk), cold / median(disk), Goal(10)),
        Row("fork of 4,000 tokens", median(forks), None, Goal(0.001, below=True)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_heading()
    rows = measure(args.threads, args.rounds)
    shown: Callable[[float], str] = lambda s: f"{1000 * s:.3g} ms"  # noqa: E731
    lines = [
        [
            row.work,
            shown(row.seconds),
            "-" if row.times is None else f"{row.times:.1f} x",
            "-" if row.goal is None else "< 1 ms" if row.goal.below else wanted(row.goal),
            verdict(row.seconds if row.times is None else row.times, row.goal),
        ]
        for row in rows
    ]
    print(markdown(["work", "seconds", "faster", "wanted", "reached"], lines))
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
