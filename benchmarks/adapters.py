"""What adapters cost: steps with low-rank adapters in them against the same steps of the base.

    python -m benchmarks.adapters [--rounds 9] [--threads 1 2] [--json FILE]

Wanted: 8 adapters of rank 8 on q and v (what PEFT takes for Llama when not told), mixed in a
batch of 8 decode rows, at no less than 0.8 x the tokens/s of the base alone. Random matrices:
their values cost nothing. Cells of one setting take turns in one process over the same weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness.machine import print_heading
from benchmarks.harness.side import token_ids
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from localllm import hub
from localllm.adapters.lora import LINEARS, LoraAdapter, LowRank, make_adapter
from localllm.backend.cpu import CpuBackend
from localllm.backend.protocol import Batch, Chunk
from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.tensor import Dense, DType
from localllm.models import load_spec, load_weights
from localllm.spec import DecoderSpec
from localllm.spec.weights import weight_shapes

CONTEXT, STEPS, SEQUENCES, PREFILL = 128, 12, 8, 512
BLOCKS = 8  # of 32 positions, of each sequence
GOAL = Goal(0.8)
QV = ("attn.q", "attn.v")


@dataclass(frozen=True)
class Setting:
    """adapters: how many different ones serve the 8 decode rows."""

    rank: int
    linears: tuple[str, ...]
    dtype: DType
    adapters: int = SEQUENCES
    goal: Goal | None = None


SETTINGS = (
    Setting(8, QV, "float32", goal=GOAL),
    Setting(8, QV, "bfloat16"),
    Setting(8, QV, "float32", adapters=1),
    Setting(16, LINEARS, "float32"),
    Setting(16, LINEARS, "bfloat16"),
    Setting(16, LINEARS, "float32", adapters=1),
)


@dataclass(frozen=True)
class Row:
    """Tokens/s: of 8 decode rows at context 128, and of a prefill of 512 with one adapter."""

    threads: int
    rank: int
    linears: str
    dtype: str
    adapters: int
    megabytes: float  # of one adapter
    base: float
    adapted: float
    ratio: float
    prefill_base: float
    prefill_adapted: float
    prefill_ratio: float


def random_adapter(spec: DecoderSpec, setting: Setting, seed: int) -> LoraAdapter:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Dense:
        values = random.normal(scale=columns**-0.5, size=(rows, columns)).astype(np.float32)
        if setting.dtype == "bfloat16":
            return Dense((values.view(np.uint32) >> 16).astype(np.uint16), "bfloat16")
        return Dense(values, "float32")

    targets = {}
    for name, shape in weight_shapes(spec).items():
        target = name.removesuffix(".weight")
        if target.split(".", 2)[-1] in setting.linears:
            a, b = matrix(setting.rank, shape[1]), matrix(shape[0], setting.rank)
            targets[target] = LowRank(a, b, 2.0)
    return make_adapter(f"random {seed}", targets)


def chunk(sequence: int, start: int, count: int, adapter: int | None) -> Chunk:
    table = np.arange(sequence * BLOCKS, (sequence + 1) * BLOCKS, dtype=np.int32)
    if count > BLOCKS * 32:
        table = np.arange(SEQUENCES * BLOCKS, SEQUENCES * BLOCKS + PREFILL // 32, dtype=np.int32)
    ids = np.array(token_ids(start, count), np.int32)
    return Chunk(ids, start, table, (count - 1,), start + count, adapter)


def seconds(backend: CpuBackend, chunks: list[Chunk]) -> float:
    start = time.perf_counter()
    backend.forward(Batch(tuple(chunks))).argmax(axis=1)
    return time.perf_counter() - start


def measure(backend: CpuBackend, setting: Setting, rounds: int) -> Row:
    loaded = [random_adapter(backend.spec, setting, seed) for seed in range(setting.adapters)]
    indices = [backend.add_adapter(adapter) for adapter in loaded]
    for sequence in range(SEQUENCES):
        backend.forward(Batch((chunk(sequence, 0, CONTEXT, None),)))

    def decode(adapted: bool) -> Callable[[], float]:
        chosen = [indices[s % len(indices)] if adapted else None for s in range(SEQUENCES)]
        step = [chunk(s, CONTEXT, 1, adapter) for s, adapter in enumerate(chosen)]
        return lambda: statistics.median(seconds(backend, step) for _ in range(STEPS))

    def prefill(adapted: bool) -> Callable[[], float]:
        step = [chunk(0, 0, PREFILL, indices[0] if adapted else None)]
        return lambda: seconds(backend, step)

    turns = [decode(False), decode(True), prefill(False), prefill(True)]
    taken: list[list[float]] = [[] for _ in turns]
    for turn in turns:
        turn()
    for number in range(rounds):
        order = range(len(turns)) if number % 2 == 0 else reversed(range(len(turns)))
        for index in order:
            taken[index].append(turns[index]())
    base, adapted, prefill_base, prefill_adapted = (statistics.median(t) for t in taken)
    for index in indices:
        backend.remove_adapter(index)
    return Row(
        threads=backend.threads,
        rank=setting.rank,
        linears="q, v" if setting.linears == QV else "all seven",
        dtype=setting.dtype,
        adapters=setting.adapters,
        megabytes=backend.adapter_bytes(loaded[0]) / 1e6,
        base=SEQUENCES / base,
        adapted=SEQUENCES / adapted,
        ratio=base / adapted,
        prefill_base=PREFILL / prefill_base,
        prefill_adapted=PREFILL / prefill_adapted,
        prefill_ratio=prefill_base / prefill_adapted,
    )


def open_backend(path: Path, threads: int, kernels: str | None) -> CpuBackend:
    checkpoint = open_checkpoint(path)
    spec = load_spec(checkpoint)
    blocks = SEQUENCES * BLOCKS + PREFILL // 32
    return CpuBackend(
        spec, load_weights(checkpoint, spec), num_blocks=blocks, threads=threads, kernels=kernels
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kernels", help="an instruction set; the best if left out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_heading()
    rows, goals = [], []
    for threads in args.threads:
        backend = open_backend(hub.resolve(args.model).path, threads, args.kernels)
        print(f"{args.model}, {backend.kernels}, {backend.threads} thread(s)")
        rows += [measure(backend, setting, args.rounds) for setting in SETTINGS]
        goals += [setting.goal for setting in SETTINGS]
        backend.close()
    print(f"\n8 decode rows at context {CONTEXT}; prefill of {PREFILL} with one adapter; tokens/s,")
    print(f"medians of {args.rounds} rounds in turn\n")
    header = (
        "threads", "rank", "linears", "dtype", "adapters", "MB each", "base", "adapted", "ratio",
        "wanted", "reached", "prefill base", "adapted", "ratio",
    )  # fmt: skip
    shown = [
        [
            str(row.threads),
            str(row.rank),
            row.linears,
            row.dtype,
            str(row.adapters),
            f"{row.megabytes:.1f}",
            f"{row.base:.0f}",
            f"{row.adapted:.0f}",
            f"{row.ratio:.2f}",
            wanted(goal),
            verdict(row.ratio, goal),
            f"{row.prefill_base:.0f}",
            f"{row.prefill_adapted:.0f}",
            f"{row.prefill_ratio:.2f}",
        ]
        for row, goal in zip(rows, goals, strict=True)
    ]
    print(markdown(header, shown))
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
