"""A fine-tuning run around its steps: memory planned and taken, and what checkpoints cost.

    python -m benchmarks.training_run [STEPS]

Each shape runs in a process of its own, on random words, with a checkpoint after every step; that
is far more often than anyone would save, so the share of time is told for one a hundred steps too.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.harness.table import markdown

SHAPES = ((4, 1, 256), (2, 2, 256), (1, 1, 1024), (8, 1, 128))  # batch, accumulate, length
WORDS = ["river", "mountain", "table", "colour", "window", "kitchen", "music", "number"]


def measure(size: int, accumulate: int, length: int, steps: int) -> dict[str, float]:
    """In this process: the plan, the highest memory, and seconds of steps and of standing still."""
    from localllm.machine import resident_memory
    from localllm.train import Trainer

    source = random.Random(0)
    events: list[dict] = []

    class Kept:
        def on_event(self, event: dict) -> None:
            events.append(event)

        def close(self) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        with data.open("w") as file:
            for _ in range(size * accumulate * steps):
                count = int(length * source.uniform(0.6, 0.8))
                file.write(json.dumps({"text": " ".join(source.choices(WORDS, k=count))}) + "\n")
        config = {
            "model": "smollm2:135m",
            "out": f"{folder}/run",
            "data": {"source": str(data), "seq_len": length, "on_long": "cut"},
            "batch": {"size": size, "accumulate": accumulate},
            "run": {"steps": steps, "save_every": 1},
        }
        with Trainer(config, callbacks=[Kept()]) as trainer:
            trainer.train()
    plan = next(event for event in events if event["type"] == "plan")
    step = median(event["seconds"] for event in events if event["type"] == "step")
    still = median(event["seconds"] for event in events if event["type"] == "checkpoint")
    return {
        "planned": plan["total_bytes"],
        "peak": resident_memory()[1] or 0,
        "step": step,
        "still": still,
    }


def main(words: list[str]) -> None:
    if len(words) > 1:
        print(json.dumps(measure(*map(int, words))))
        return
    steps = words[0] if words else "6"
    rows = []
    for shape in SHAPES:
        command = [sys.executable, "-m", "benchmarks.training_run", *map(str, shape), steps]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append(
            (
                "{} x {} x {}".format(*shape),
                f"{found['planned'] / 1e6:.0f} MB",
                f"{found['peak'] / 1e6:.0f} MB",
                f"{found['planned'] / found['peak'] - 1:+.1%}",
                f"{1e3 * found['still']:.0f} ms",
                f"{found['still'] / (found['still'] + found['step']):.2%}",
                f"{found['still'] / (found['still'] + 100 * found['step']):.3%}",
            )
        )
    header = (
        "batch x accumulate x length", "planned", "measured", "off by", "a checkpoint",
        "of the time, each step", "each 100",
    )  # fmt: skip
    print(markdown(header, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
