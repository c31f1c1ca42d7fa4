"""The second turn of a long chat with a model most of whose layers keep a state instead of K and V.

    python -m benchmarks.hybrid_turns [--rounds 3] [--threads N] [--json FILE]

A decoder of Qwen 3.5's pattern (three gated delta nets, then gated attention), 8 layers of 1,024,
random weights in 4 bits; a chat of 4,000 tokens, an answer of 40, a next message of 20. Time to
first token of the second turn against the same without any cache (wanted: 20 x less). Also what a
state takes, and how long it takes to copy one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness.machine import print_heading
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from localllm.backend.cpu import CpuBackend
from localllm.checkpoint.tensor import Affine, Dense, GroupValues, Tensor
from localllm.engine import Engine, Request, Token
from localllm.sampling import SamplingParams
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    GatedDeltaNetSpec,
    LayerSpec,
    NormSpec,
    RopeSpec,
)
from localllm.spec.memory import state_bytes
from localllm.spec.weights import weight_shapes

LENGTH, ANSWER, MESSAGE, STATES = 4000, 40, 20, 16
_GROUP = 32


def spec() -> DecoderSpec:
    norm = NormSpec(offset=1.0)
    attends = AttentionSpec(
        heads=8,
        kv_heads=2,
        head_dim=128,
        scale=128**-0.5,
        rope=RopeSpec(32),
        qk_norm=norm,
        gate=True,
    )
    delta = GatedDeltaNetSpec(key_heads=8, value_heads=16, key_dim=128, value_dim=128, kernel=4)
    ffn = FeedForwardSpec(3072)
    layers = tuple(LayerSpec(m, ffn, norm) for m in (delta, delta, delta, attends) * 2)
    return DecoderSpec("qwen3_5", 32_000, 1024, layers, norm, 8192, tied_head=True)


def weights() -> Iterator[tuple[str, Tensor]]:
    random = np.random.default_rng(1)
    for name, shape in weight_shapes(spec()).items():
        if len(shape) == 1:
            yield name, Dense((random.normal(size=shape) * 0.3).astype(np.float32), "float32")
            continue
        rows, width = shape
        codes = random.integers(0, 1 << 32, (rows, width // 8), dtype=np.uint32)
        scales = np.full((rows, width // _GROUP), width**-0.5 / 4, np.float16)
        yield name, Affine(codes, 4, _GROUP, GroupValues(scales), None, 8)


@dataclass(frozen=True)
class Row:
    work: str
    seconds: float
    times: float | None  # the first row's seconds over these
    goal: Goal | None


class Chat:
    def __init__(self, threads: int | None) -> None:
        self.backend = CpuBackend(
            spec(), weights(), num_blocks=512, threads=threads, state_slots=STATES
        )
        self.engine = Engine(self.backend, context=8192)

    def ask(
        self, prompt: list[int], *, reuse: bool, answer: int = 1
    ) -> tuple[float, list[int], int]:
        """Seconds to the first token, the answer, and the prompt's tokens that were cached."""
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        start, first, tokens, cached = time.perf_counter(), 0.0, list[int](), 0
        self.engine.add(Request(tuple(prompt), params, reuse=reuse))
        while self.engine.busy:
            for event in self.engine.step():
                if isinstance(event, Token):
                    first = first or time.perf_counter() - start
                    tokens.append(event.draw.token_id)
                else:
                    cached = event.receipt.cached_tokens
        return first, tokens, cached


def measure(threads: int | None, rounds: int) -> list[Row]:
    chat = Chat(threads)
    whole: list[float] = []
    second: list[float] = []
    for number in range(rounds):
        random = np.random.default_rng(number)
        prompt = random.integers(0, 32_000, LENGTH).tolist()
        message = random.integers(0, 32_000, MESSAGE).tolist()
        _, answer, _ = chat.ask(prompt, reuse=True, answer=ANSWER)
        turn = [*prompt, *answer, *message]
        seconds, _, cached = chat.ask(turn, reuse=True)
        assert cached >= LENGTH, f"only {cached} tokens were found"
        second.append(seconds)
        whole.append(chat.ask(turn, reuse=False)[0])
    start = time.perf_counter()
    chat.backend.write_state(1, chat.backend.read_state(0))
    copied = time.perf_counter() - start
    cold, warm = statistics.median(whole), statistics.median(second)
    return [
        Row("second turn, no cache", cold, None, None),
        Row("second turn, from memory", warm, cold / warm, Goal(20)),
        Row("a state read and written", copied, None, None),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_heading()
    print(f"{STATES} states of {state_bytes(spec()) / 2**20:.1f} MiB\n")
    rows = measure(args.threads, args.rounds)
    lines = [
        [
            row.work,
            f"{1000 * row.seconds:.3g} ms",
            "-" if row.times is None else f"{row.times:.1f} x",
            "-" if row.goal is None else wanted(row.goal),
            "-" if row.times is None else verdict(row.times, row.goal),
        ]
        for row in rows
    ]
    print(markdown(["work", "time", "faster", "wanted", "reached"], lines))
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
