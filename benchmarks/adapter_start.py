"""How long it takes from a trained adapter on disk to its first token, in a running process.

    python -m benchmarks.adapter_start [--rounds 10] [--dora]

SmolLM2-135M with an adapter of rank 8 on every linear: `llm.load_adapter`, then a chat's first
token. Wanted: under 1 second.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness.machine import print_heading
from localllm import LLM, SamplingParams
from localllm.adapters import load_adapter, weights_in
from localllm.adapters.writing import save_adapter
from tests.adapters.layouts import Settings, layout

MODEL = "smollm2:135m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    print_heading()
    settings = Settings(dora=arguments.dora)
    loads, firsts = [], []
    with LLM(MODEL, threads=arguments.threads) as llm, tempfile.TemporaryDirectory() as temporary:
        made = layout(llm.spec, settings, rank=lambda target: 8)
        prompt = llm.chat_prompt([{"role": "user", "content": "Why is the sky blue?"}])
        params = SamplingParams(max_tokens=1, temperature=0.0)
        llm.generate(prompt, params)  # what the first request of all costs is another matter
        for n in range(arguments.rounds):
            values = np.random.default_rng(n).normal(0, 0.02, made.size).astype(np.float32)
            for name, view in made.views(values).items():
                if name.endswith("magnitude"):
                    view[:] = np.abs(view) + 1
            folder = Path(temporary) / f"adapter{n}"
            save_adapter(folder, made, values, config=settings, base_model=MODEL, spec=llm.spec)
            if arguments.dora:  # as the trainer does: the lengths of rows stay beside it
                load_adapter(folder, llm.spec, base=weights_in(llm.info.path, llm.spec))
            began = time.perf_counter()
            name = llm.load_adapter(folder)
            loads.append(time.perf_counter() - began)
            llm.generate(prompt, params, adapter=name)
            firsts.append(time.perf_counter() - began)
            llm.unload_adapter(name)
    print(
        f"load {statistics.median(loads) * 1e3:.0f} ms, first token after "
        f"{statistics.median(firsts) * 1e3:.0f} ms (slowest {max(firsts) * 1e3:.0f}) "
        f"over {arguments.rounds} rounds"
    )


if __name__ == "__main__":
    main()
