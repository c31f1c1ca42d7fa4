"""A mixture of experts larger than memory: its speed beside all of it in memory, and as announced.

    python -m benchmarks.experts [--gigabytes 1.5] [--limit 1.0] [--tokens 64] [--rounds 3]
        [--folder DIR] [--json FILE]

Makes a random mixture of that size, then decodes the same random tokens in processes of their own,
in turn: one with all of it in memory, one under a control group's memory limit, where the plan
leaves experts on disk. Says how fast each was, whether the limited one was killed, whether both
gave the same tokens, and how far the speed that loading announced is from what came.
Linux, as root: others may not make control groups. Without them it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.harness.machine import describe, print_heading
from localllm.checkpoint.safetensors import write_safetensors

HIDDEN, INNER, LAYERS, TOP_K, VOCAB = 512, 512, 12, 4, 4096

CHILD = """
import json, sys
from localllm import LLM, SamplingParams
settings = json.loads(sys.argv[1])
with LLM(settings["model"], backend="cpu", context=512, kv_tokens=512, max_batch=1) as llm:
    def answer(seed):
        params = SamplingParams(
            temperature=2.0, seed=seed, max_tokens=settings["tokens"], ignore_eos=True
        )
        return llm.generate([seed * 7 + i * 31 for i in range(32)], params)
    answer(9)
    results = [answer(seed) for seed in settings["seeds"]]
    use = llm._model.backend.experts
    print(json.dumps({
        "speed": [r.receipt.decode_tokens_per_second for r in results],
        "tokens": [result.token_ids for result in results],
        "experts": None if use is None else [use.in_memory, use.experts, use.chosen, use.read],
        "expected": None if use is None else use.expected_speed,
        "peak": int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")))
            << 10,
    }))
"""


def write_model(folder: Path, gigabytes: float) -> int:
    """A Qwen 3 MoE with random weights in float16; its experts in each layer."""
    each = 3 * HIDDEN * INNER * 2
    experts = round(gigabytes * 1e9 / LAYERS / each)
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "moe_intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": experts,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1])).astype(np.float16)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB, HIDDEN),
        "lm_head.weight": matrix(VOCAB, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        tensors |= {
            f"{at}input_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{at}post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{at}self_attn.q_norm.weight": np.ones(64, np.float32),
            f"{at}self_attn.k_norm.weight": np.ones(64, np.float32),
            f"{at}self_attn.q_proj.weight": matrix(512, HIDDEN),
            f"{at}self_attn.k_proj.weight": matrix(128, HIDDEN),
            f"{at}self_attn.v_proj.weight": matrix(128, HIDDEN),
            f"{at}self_attn.o_proj.weight": matrix(HIDDEN, 512),
            f"{at}mlp.gate.weight": matrix(experts, HIDDEN),
            f"{at}mlp.experts.gate_up_proj": matrix(experts, 2 * INNER, HIDDEN),
            f"{at}mlp.experts.down_proj": matrix(experts, HIDDEN, INNER),
        }
    write_safetensors(folder / "model.safetensors", tensors)
    return experts


class MemoryGroup:
    """A control group with a limit, v2 or v1; raises OSError where none can be made."""

    def __init__(self, limit: int) -> None:
        unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        self._root = Path("/sys/fs/cgroup") if unified else Path("/sys/fs/cgroup/memory")
        self.folder = self._root / f"localllm-bench-{os.getpid()}"
        self.folder.mkdir()
        try:
            name = "memory.max" if unified else "memory.limit_in_bytes"
            (self.folder / name).write_text(str(limit))
        except OSError:
            self.folder.rmdir()
            raise

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        self.folder.rmdir()


def run(
    model: Path, tokens: int, group: MemoryGroup | None, seeds: Sequence[int] = (0, 1, 2)
) -> dict[str, Any] | None:
    """None if the process was killed."""
    settings = json.dumps({"model": str(model), "tokens": tokens, "seeds": list(seeds)})
    done = subprocess.run(
        [sys.executable, "-c", CHILD, settings],
        preexec_fn=None if group is None else group.enter,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode == -9:
        return None
    if done.returncode:
        raise SystemExit(f"a run failed with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--limit", type=float, default=1.0, help="gigabytes")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_heading()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        os.environ["LOCALLLM_HOME"] = str(folder / "home")
        try:
            group = MemoryGroup(int(args.limit * 1e9))
        except OSError as error:
            print(f"no control group can be made here ({error}): nothing was measured")
            return
        try:
            experts = write_model(folder / "model", args.gigabytes)
            print(f"{LAYERS} layers of {experts} experts, {TOP_K} chosen; limit {args.limit} GB")
            found: dict[str, list[dict[str, Any] | None]] = {"whole": [], "limited": []}
            run(
                folder / "model", args.tokens, group, (3, 4, 5)
            )  # packs it, and learns which ones are used
            for _ in range(args.rounds):
                found["whole"].append(run(folder / "model", args.tokens, None))
                found["limited"].append(run(folder / "model", args.tokens, group))
        finally:
            group.close()
    report = _report(found)
    if args.json:
        args.json.write_text(json.dumps({"machine": describe(), **report}, indent=2))


def _report(found: dict[str, list[dict[str, Any] | None]]) -> dict[str, Any]:
    killed = sum(run is None for run in found["limited"])
    whole = [run for run in found["whole"] if run]
    limited = [run for run in found["limited"] if run]
    report: dict[str, Any] = {"killed": killed, "rounds": len(found["limited"])}
    print(f"killed for its memory: {killed} of {report['rounds']} limited runs")
    if limited and whole:
        speeds = {"whole": whole, "limited": limited}
        fast, slow = (median(s for r in runs for s in r["speed"]) for runs in speeds.values())
        expected = median(run["expected"] for run in limited)
        in_memory, experts, chosen, read = limited[-1]["experts"]
        report |= {
            "whole": fast,
            "limited": slow,
            "expected": expected,
            "in_memory": in_memory,
            "experts": experts,
            "read_share": read / chosen,
            "same_tokens": all(r["tokens"] == whole[0]["tokens"] for r in whole + limited),
            "peak_limited": max(r["peak"] for r in limited),
        }
        print(f"all in memory   {fast:8.1f} tokens/s")
        print(f"limited         {slow:8.1f} tokens/s, {slow / fast:.2f} x")
        print(f"announced       {expected:8.1f} tokens/s, {expected / slow - 1:+.0%}")
        print(
            f"{in_memory} of {experts} experts in memory; {read / chosen:.0%} of those chosen read"
        )
        print(f"peak of the limited process {report['peak_limited'] / 1e6:.0f} MB")
        print(f"the same tokens: {'yes' if report['same_tokens'] else 'NO'}")
    return report


if __name__ == "__main__":
    main()
