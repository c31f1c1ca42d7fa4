"""How right a memory plan is: a process that fills everything it planned for.

    python -m benchmarks.fill_memory [--model smollm2:135m] [--context 1024] [--kv-tokens 2048]
        [--batch 4] [--kv-bits 16] [--json FILE]

A fresh process loads the model with these settings, fills every KV block with random prompts, runs
a full step and a full batch, takes the log-probabilities of a prompt, and checks as many guesses
as may be: one of the two needs the most logits. What it grew by at most since the plan was made
stands against what was planned.
Linux only: other systems do not tell the peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = """
import json, re, sys
from pathlib import Path

import numpy as np

from localllm import LLM, SamplingParams
from localllm.backend.protocol import Batch, Chunk
from localllm.engine.planner import DRAFT_ROWS

settings = json.loads(sys.argv[1])
llm = LLM(settings.pop("model"), offline=True, **settings)
plan, engine = llm._model.plan, llm._model.engine
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
rng = np.random.default_rng(0)

def prompts(count, length):
    return rng.integers(0, llm.spec.vocab_size, (count, length)).tolist()

batch = plan.wish.max_batch
length = min(plan.context, plan.kv_tokens // batch)
few = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
used = [set() for _ in engine.cache.pools]
for group, pool in enumerate(engine.cache.pools):
    def allocate(allocate=pool.allocate, seen=used[group]):
        block = allocate()
        seen.add(block)
        return block
    pool.allocate = allocate
llm.generate(prompts(batch, length - 8), few)
for _ in range(8):
    if all(len(seen) == pool.num_blocks for seen, pool in zip(used, engine.cache.pools)):
        break
    llm.generate(prompts(1, plan.context - 8), few)
every = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=0)
llm.generate(prompts(min(batch, 4), min(200, length - 2)), [every] + [few] * (min(batch, 4) - 1))
rows = batch + DRAFT_ROWS  # a step in which as many guesses as may be are checked
ids = np.zeros(rows, np.int32)
blocks = np.arange(-(-rows // plan.block_size), dtype=np.int32)
engine.backend.forward(Batch((Chunk(ids, 0, blocks, tuple(range(rows)), rows),)))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({
    "items": {item.name: item.nbytes for item in plan.items},
    "planned": plan.total - plan.resident,
    "grown": peak - plan.resident,
    "resident": plan.resident,
    "unused": [pool.num_blocks - len(seen) for seen, pool in zip(used, engine.cache.pools)],
}))
"""


def fill(**settings: Any) -> dict[str, Any]:
    """Bytes: what was planned beyond the process itself, and what it grew by at most."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(settings)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"filling failed:\n{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--kv-tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--kv-bits", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = fill(
        model=args.model,
        context=args.context,
        kv_tokens=args.kv_tokens,
        max_batch=args.batch,
        kv_bits=args.kv_bits,
    )
    for name, nbytes in found["items"].items():
        print(f"{name:<10} {nbytes / 1e6:8.1f} MB")
    print(f"\nplanned beside the process itself {found['planned'] / 1e6:.1f} MB")
    print(f"grown at most                      {found['grown'] / 1e6:.1f} MB")
    print(f"the plan is off by                 {found['planned'] / found['grown'] - 1:+.1%}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
