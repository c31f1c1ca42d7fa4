"""The loss of every step, ours against torch + transformers + peft from the same start.

    python -m benchmarks.loss_curve [--steps 200] [--batch 2] [--length 128] [--json OUT]

The peer takes what we write: SmolLM2-135M dequantized to float32, the adapter before its first step
(rank 8 on all linears), and the examples of every step with their masks. Learning rates, clipping
and AdamW are the same, so the two curves may differ by rounding alone. Run with a Python that has
the `parity` extra; without it the peer is left out, and the run says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.table import Goal, markdown, verdict

MODEL = "smollm2:135m"
LIMIT = Goal(0.01, below=True)  # of a step's loss, relative
_SHOWN = 8  # rows of the table


def texts(count: int) -> Iterator[str]:
    """Paragraphs of the language reference that Python ships."""
    from pydoc_data.topics import topics

    paragraphs = [
        " ".join(part.split())
        for name in sorted(topics)
        for part in topics[name].split("\n\n")
        if len(part) > 200
    ]
    assert len(paragraphs) >= count, f"only {len(paragraphs)} paragraphs"
    yield from paragraphs[:count]


def ours(folder: Path, steps: int, size: int, length: int, program: str) -> list[float]:
    """Trains by the native program; leaves the peer's model, adapter and steps in `folder`."""
    from localllm.adapters.writing import save_adapter
    from localllm.export import open_source, write_folder
    from localllm.train import Trainer
    from localllm.train.batching import Batches
    from localllm.train.lora import LoRAConfig
    from localllm.train.parts import Parts, open_parts, tokens_of
    from localllm.train.schedules import make_schedule

    data = folder / "data.jsonl"
    rows = [json.dumps({"text": text}) for text in texts(steps * size)]
    data.write_text("\n".join(rows) + "\n", "utf-8")
    opened: list[Parts] = []
    losses: list[float] = []

    def opening(config: Any) -> Parts:
        opened.append(open_parts(config))
        return opened[-1]

    class Losses:
        def on_event(self, event: dict[str, Any]) -> None:
            if event["type"] == "step":
                losses.append(event["loss"])

        def close(self) -> None:
            pass

    config = {
        "model": MODEL,
        "out": str(folder / "run"),
        "program": program,
        "data": {"source": str(data), "seq_len": length, "on_long": "cut"},
        "batch": {"size": size},
        "optimizer": {"lr": 2e-4},
        "run": {"steps": steps, "save_every": steps, "eval_every": steps},
    }
    with Trainer(config, callbacks=[Losses()], parts=opening) as trainer:
        trainer.prepare()
        (parts,), settled = opened, trainer.config
        assert isinstance(parts.tune, LoRAConfig)
        save_adapter(
            folder / "start",
            parts.layout,
            parts.initial,
            config=parts.tune,
            base_model=MODEL,
            spec=parts.spec,
        )
        told = settled.optimizer
        schedule = make_schedule(
            told.schedule, steps, warmup=told.warmup, minimum=told.min_lr, decay=told.decay
        )
        batches = Batches(
            [tokens_of(example) for example in parts.data.train],
            size=size,
            accumulate=1,
            tokens=None,
            seed=settled.seed,
        )
        lines = []
        for step in range(steps):
            (places,) = batches.at(step).micro_batches
            examples: list[Any] = [parts.data.train[place] for place in places]
            lines.append(
                {
                    "tokens": [example.tokens.tolist() for example in examples],
                    "trained": [example.trained.tolist() for example in examples],
                    "lr": (told.lr or 0.0) * schedule(step),
                }
            )
        settings = {"weight_decay": told.weight_decay, "clip": told.clip, "steps": lines}
        (folder / "steps.json").write_text(json.dumps(settings), "utf-8")
        trainer.train()
    with open_source(MODEL) as source:
        write_folder(source, folder / "model", "float32")
    return losses


def peer(folder: Path, threads: int) -> list[float]:
    import torch
    from peft import PeftModel
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "start", is_trainable=True)
    told = json.loads((folder / "steps.json").read_text("utf-8"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=told["weight_decay"])
    losses = []
    for step in told["steps"]:
        longest = max(map(len, step["tokens"]))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in step["tokens"]])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in step["tokens"]])
        counts = torch.tensor([row + [False] * (longest - len(row)) for row in step["trained"]])
        labels = torch.where(counts, ids, -100)[:, 1:]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="mean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, told["clip"] or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = step["lr"]
        optimizer.step()
        losses.append(float(loss.detach()))
        if len(losses) % 20 == 0:
            print(f"torch: {losses[-1]:.4f} at step {len(losses)}", file=sys.stderr, flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--program", choices=("native", "reference"), default="native")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:  # a process of its own, so that it has the machine's memory to itself
        print(json.dumps(peer(args.peer, args.threads)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mine = ours(folder, args.steps, args.batch, args.length, args.program)
        print(f"ours: {mine[0]:.4f} at first, {mine[-1]:.4f} at step {len(mine)}", flush=True)
        missing = [n for n in ("torch", "transformers", "peft") if not importlib.util.find_spec(n)]
        if missing:
            print(f"no comparison: {', '.join(missing)} is not installed here")
            return
        command = [sys.executable, "-m", "benchmarks.loss_curve", "--peer", name]
        command += ["--threads", str(args.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    theirs: list[float] = json.loads(done.stdout.splitlines()[-1])
    apart = [abs(a / b - 1) for a, b in zip(mine, theirs, strict=True)]
    worst = max(range(len(apart)), key=apart.__getitem__)
    shown = sorted({*range(0, len(mine), max(1, len(mine) // _SHOWN)), worst, len(mine) - 1})
    rows = [(f"{i + 1}", f"{mine[i]:.5f}", f"{theirs[i]:.5f}", f"{apart[i]:.3%}") for i in shown]
    print(markdown(("step", "ours", "torch", "apart"), rows))
    print(f"furthest apart: {apart[worst]:.4%} at step {worst + 1}, {sum(apart) / len(apart):.4%} ")
    print(f"on average; below {LIMIT.value:.0%} at every step: {verdict(apart[worst], LIMIT)}")
    if args.json:
        args.json.write_text(json.dumps({"ours": mine, "torch": theirs}) + "\n", "utf-8")


if __name__ == "__main__":
    main()
