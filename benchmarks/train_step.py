"""A training step of SmolLM2-135M by instruction set, in turns with a peer.

LoRA of rank 8 on all linears, 4 sequences of 256 tokens, against torch + transformers + peft; or
with --full all weights, clipping and AdamW, against the reference program (minutes for as much) or
against torch + transformers. Each run is a process of its own, so that peak memory is its own; the
sides take turns, and medians are compared. Processor time is of all threads, and tells most on a
busy machine. Torch comes with the `parity` extra; without it the peer of LoRA is left out.

    python -m benchmarks.train_step [--rounds 3] [--threads 2] [--steps 3]
    python -m benchmarks.train_step --full --sequences 1 --length 64 --kernels avx2 reference
    python -m benchmarks.train_step --full --kernels avx512_bf16 float32 bfloat16
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from localllm.train.program import Rows

MODEL = "smollm2:135m"
RANK = 8
# Ours, and what caps torch alike.
CAPS = {
    "amx_bf16": {},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


DTYPES = ("float32", "bfloat16")  # of torch
Shape = tuple[int, int]  # sequences, tokens of each


def tokens(vocab: int, shape: Shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, shape).astype(np.int32)


def batch(vocab: int, shape: Shape) -> tuple[Rows, np.ndarray]:
    """Rows, and the weight of each: every token but the first of a sequence counts."""
    sequences, length = shape
    ids = tokens(vocab, shape)
    rows = Rows(
        ids.reshape(-1),
        np.roll(ids, -1, axis=1).reshape(-1),
        (np.arange(sequences + 1) * length).astype(np.int32),
    )
    weights = np.full(shape, 1 / (sequences * (length - 1)), np.float32)
    weights[:, -1] = 0
    return rows, weights.reshape(-1)


def report(times: list[float], processor: float, shape: Shape) -> None:
    """times: of each step. processor: seconds of all threads in all of them."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_mb = peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    count = shape[0] * shape[1]
    speed = count / statistics.median(times)
    each = processor / (count * len(times))
    result = {"tokens_per_second": speed, "peak_mb": peak_mb, "processor_ms_per_token": each * 1e3}
    print(json.dumps(result))


def time_steps(one: Callable[[int], None], steps: int, shape: Shape) -> None:
    """one: takes a step, of this number; the first does not count."""
    times, spent = [], 0.0
    for step in range(1, steps + 2):
        spent = time.process_time() if step == 2 else spent
        start = time.perf_counter()
        one(step)
        times.append(time.perf_counter() - start)
    report(times[1:], time.process_time() - spent, shape)


def ours(kernels: str, threads: int, steps: int, shape: Shape) -> None:
    from localllm.train.base import base_weights
    from localllm.train.layout import layout_for
    from localllm.train.lora import LoRAConfig
    from localllm.train.native import NativeProgram, fused_adamw

    weights = base_weights(MODEL)
    config = LoRAConfig(rank=RANK)
    layout = layout_for(weights.spec, config)
    program = NativeProgram(weights.spec, weights, layout, config, threads=threads, kernels=kernels)
    rows, row_weights = batch(weights.spec.vocab_size, shape)
    parameters = np.random.default_rng(1).normal(0, 0.02, layout.size).astype(np.float32)
    m, v, gradient = (np.zeros_like(parameters) for _ in range(3))
    options = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}

    def one(step: int) -> None:
        gradient[:] = 0
        program.gradients(rows, row_weights, parameters, gradient)
        fused_adamw(parameters, gradient, m, v, step=step, **options)

    time_steps(one, steps, shape)


def full(kernels: str, threads: int, steps: int, shape: Shape) -> None:
    """All weights, by the native program, or as kernels say by the reference program."""
    from localllm.train.base import base_weights
    from localllm.train.layout import initial, layout_for
    from localllm.train.lora import FullConfig
    from localllm.train.optimizers import clip, make_optimizer
    from localllm.train.program import Program
    from localllm.train.programs import open_program

    weights, config = base_weights(MODEL), FullConfig(dequantize=True)
    layout = layout_for(weights.spec, config)
    program: Program
    if kernels == "reference":
        program, _ = open_program(weights, layout, config, program="reference")
    else:
        from localllm.train.native import NativeProgram

        program = NativeProgram(
            weights.spec, weights, layout, threads=threads, kernels=kernels, with_base=False
        )
    rows, row_weights = batch(weights.spec.vocab_size, shape)
    parameters = initial(layout, 0, weights)
    gradient, optimizer = np.zeros_like(parameters), make_optimizer("adamw", layout)

    def one(step: int) -> None:
        gradient[:] = 0
        program.gradients(rows, row_weights, parameters, gradient)
        clip(gradient, 1.0)
        optimizer.update(parameters, gradient, 2e-5, step)

    time_steps(one, steps, shape)


def peer(dtype: str, threads: int, steps: int, shape: Shape) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    time_torch(get_peft_model(torch_model(dtype, threads), config), steps, shape, lr=1e-4)


def peer_full(dtype: str, threads: int, steps: int, shape: Shape) -> None:
    """All weights; of bfloat16 the weights themselves and AdamW's means are bfloat16 too."""
    time_torch(torch_model(dtype, threads), steps, shape, lr=2e-5, limit=1.0)


def torch_model(dtype: str, threads: int) -> Any:
    """A Llama of SmolLM2's shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def time_torch(
    model: Any, steps: int, shape: Shape, *, lr: float, limit: float | None = None
) -> None:
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    ids = torch.tensor(tokens(model.config.vocab_size, shape), dtype=torch.long)

    def one(step: int) -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(trained, limit)
        optimizer.step()

    time_steps(one, steps, shape)


def run(side: str, name: str, args: argparse.Namespace, caps: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.train_step", "--threads", str(args.threads)]
    command += ["--steps", str(args.steps), "--side", side, "--name", name]
    command += ["--sequences", str(args.sequences), "--length", str(args.length)]
    environment = {**os.environ, **caps, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


SIDES = {"ours": ours, "full": full, "peer": peer, "peer-full": peer_full}


def compare(
    title: str, sides: list[tuple[str, str]], args: argparse.Namespace, caps: dict[str, str]
) -> None:
    """All sides in turns, then a line each."""
    results: dict[tuple[str, str], list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side in sides:
            results[side].append(run(*side, args, caps))
    for (side, name), found in results.items():
        speed = statistics.median(x["tokens_per_second"] for x in found)
        peak = max(x["peak_mb"] for x in found)
        spent = statistics.median(x["processor_ms_per_token"] for x in found)
        label = "torch" if side.startswith("peer") else "ours"
        print(
            f"{title:12} {label:5} {name:12} {speed:7.1f} tokens/s {peak:7.0f} MB "
            f"{spent:7.2f} ms/token of processor time",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--full", action="store_true", help="all weights instead of LoRA")
    parser.add_argument(
        "--kernels", nargs="*", help="with --full also: reference, float32, bfloat16"
    )
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        SIDES[args.side](args.name, args.threads, args.steps, (args.sequences, args.length))
        return
    from localllm.train.native import train_kernels

    if args.full:
        names = args.kernels or [*(name for name in CAPS if name in train_kernels()), "reference"]
        sides = [("peer-full" if name in DTYPES else "full", name) for name in names]
        compare("all weights", sides, args, {})
        return
    with_peer = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
    if not with_peer:
        print("torch, transformers or peft is not here: ours alone")
    for kernels in args.kernels or [name for name in CAPS if name in train_kernels()]:
        caps = CAPS.get(kernels, {})
        sides = [("ours", kernels)]
        if with_peer:
            # Below AVX512-BF16 torch has no fast bfloat16.
            dtypes = ["float32", "bfloat16"] if kernels.endswith("bf16") else ["float32"]
            sides += [("peer", dtype) for dtype in dtypes]
        compare(kernels, sides, args, caps)


if __name__ == "__main__":
    main()
