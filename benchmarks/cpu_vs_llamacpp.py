"""Decode and prefill of one GGUF file: this engine against llama.cpp, in turn, one thread each.

    python benchmarks/cpu_vs_llamacpp.py [MODEL.gguf] [--node-modules FOLDER] [--rounds 5]

llama.cpp comes prebuilt in node-llama-cpp 3.22.1: `npm install --ignore-scripts --prefix FOLDER
node-llama-cpp@3.22.1`; FOLDER is .venv/peers, or what LOCALLLM_PEERS names, unless told.
Without it only this engine is measured, and the output says so. Its JavaScript loop costs
nothing at one thread and starves two, so one thread is compared with one thread. Both sides are
asked for the same number of tokens at the same contexts; medians over alternating rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

from localllm import hub
from localllm.backend.cpu import CpuBackend
from localllm.backend.protocol import Batch, Chunk
from localllm.checkpoint import open_checkpoint
from localllm.models import load_spec, load_weights

PEERS = Path(os.environ.get("LOCALLLM_PEERS", Path(__file__).parents[1] / ".venv" / "peers"))
PREFILL = 512
CONTEXTS = (128, 4096)
DECODED = 16  # tokens a round
BLOCKS = 160  # of 32 positions


class Ours:
    def __init__(self, model: Path, threads: int) -> None:
        checkpoint = open_checkpoint(model)
        spec = load_spec(checkpoint)
        weights = load_weights(checkpoint, spec)
        self.backend = CpuBackend(spec, weights, num_blocks=BLOCKS, threads=threads)
        self._table = np.arange(BLOCKS, dtype=np.int32)
        self._filled = 0

    def _run(self, count: int, start: int, table: np.ndarray | None = None) -> Chunk:
        ids = (1000 + np.arange(count) * 7919 % 40000).astype(np.int32)
        table = self._table if table is None else table
        return Chunk(ids, start, table, (count - 1,), start + count)

    def prefill(self, count: int) -> float:
        """Seconds for a prompt of `count` tokens."""
        start = time.perf_counter()
        self.backend.forward(Batch((self._run(count, 0),)))
        self._filled = count
        return time.perf_counter() - start

    def decode(self, context: int, count: int) -> float:
        """Median seconds a token."""
        for at in range(self._filled, context, PREFILL):
            self.backend.forward(Batch((self._run(min(PREFILL, context - at), at),)))
        self._filled = context
        times = []
        for at in range(context, context + count):
            start = time.perf_counter()
            logits = self.backend.forward(Batch((self._run(1, at),)))
            logits.argmax()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def batch(self, sequences: int) -> float:
        """Median seconds of a step that decodes one token in each of so many sequences."""
        tables = [self._table[4 * i : 4 * i + 4] for i in range(sequences)]
        step = Batch(tuple(self._run(1, 127, table) for table in tables))
        return self._median(step)

    def verify(self, drafts: int) -> float:
        """Median seconds of a step over `drafts` + 1 rows of one sequence, all with logits."""
        chunk = self._run(drafts + 1, 120)
        rows = tuple(range(drafts + 1))
        return self._median(
            Batch((Chunk(chunk.token_ids, 120, chunk.block_table, rows, 121 + drafts),))
        )

    def _median(self, step: Batch) -> float:
        self._filled = 0
        times = []
        for _ in range(12):
            start = time.perf_counter()
            self.backend.forward(step)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


class LlamaCpp:
    def __init__(self, model: Path, threads: int, node_modules: Path) -> None:
        script = Path(__file__).with_suffix(".mjs")
        command = ["node", str(script), str(model), str(threads), str(node_modules)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.system = self._answer()["systemInfo"]

    def _answer(self) -> dict[str, str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("llama.cpp's side ended early")
        answer: dict[str, str] = json.loads(line)
        return answer

    def _ask(self, **request: object) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def prefill(self, count: int) -> float:
        return self._ask(op="prefill", tokens=count)

    def decode(self, context: int, count: int) -> float:
        return self._ask(op="decode", context=context, tokens=count)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def find_peer(args: argparse.Namespace) -> LlamaCpp | None:
    folder = args.node_modules
    if folder is None or not (folder / "node_modules" / "node-llama-cpp").is_dir():
        print("llama.cpp: not measured (node-llama-cpp not found; see --node-modules)")
        return None
    if shutil.which("node") is None:
        print("llama.cpp: not measured (node is not installed)")
        return None
    return LlamaCpp(args.model, 1, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="a GGUF file; SmolLM2 unless told")
    parser.add_argument("--node-modules", type=Path, default=PEERS)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.model = args.model or hub.resolve("smollm2:135m").path
    ours, peer = Ours(args.model, 1), find_peer(args)
    print(f"machine: {platform.processor() or platform.machine()}, {os.cpu_count()} processors")
    print(f"localllm: {ours.backend.kernels}; llama.cpp: {peer.system if peer else '-'}")

    tests = {f"prefill {PREFILL}": (PREFILL, lambda side: side.prefill(PREFILL))}
    for context in CONTEXTS:
        tests[f"decode at {context}"] = (1, lambda side, at=context: side.decode(at, DECODED))
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in tests}
    for name, (tokens, measure) in tests.items():
        for _ in range(args.rounds):
            rates[name][0].append(tokens / measure(ours))
            if peer:
                rates[name][1].append(tokens / measure(peer))
    print(f"{'tok/s, 1 thread':<18}{'localllm':>10}{'llama.cpp':>11}{'ratio':>8}")
    for name, (mine, theirs) in rates.items():
        line = f"{name:<18}{statistics.median(mine):>10.1f}"
        if theirs:
            ratio = statistics.median(mine) / statistics.median(theirs)
            line += f"{statistics.median(theirs):>11.1f}{ratio:>7.2f}x"
        print(line)
    if peer:
        peer.close()

    print("\nlocalllm alone, tok/s")
    for threads in (1, 2):
        side = Ours(args.model, threads) if threads > 1 else ours
        one = side.batch(1)
        figures = [f"{n} sequences {n / side.batch(n):.0f}" for n in (2, 4, 8, 32)]
        print(f"{threads} thread(s): 1 sequence {1 / one:.0f}, {', '.join(figures)}")
        print(f"  prefill {PREFILL}: {PREFILL / min(side.prefill(PREFILL) for _ in range(3)):.0f}")
        for context in CONTEXTS:
            print(f"  decode at {context}: {1 / side.decode(context, DECODED):.1f}")
        print(f"  verifying 4 drafts takes {side.verify(4) / one:.2f} x one token")


if __name__ == "__main__":
    main()
