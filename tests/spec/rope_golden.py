"""Rewrites rope_golden.json from `transformers` (needs the `parity` extra):

python -m tests.spec.rope_golden
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from localllm.spec import RopeSpec

GOLDEN = Path(__file__).with_suffix(".json")
POSITIONS = 131072  # max_position_embeddings of every case but the dynamic ones


def cases() -> list[tuple[RopeSpec, int]]:
    """Specs with the sequence length to ask for."""
    shorts = tuple(np.linspace(1, 2, 48).tolist())
    longs = tuple(np.linspace(1.5, 40, 48).tolist())
    longrope = RopeSpec(
        96, 1e4, "longrope", factor=32.0, original_context=4096, short_factor=shorts,
        long_factor=longs,
    )  # fmt: skip
    dynamic = RopeSpec(64, 1e4, "dynamic", factor=4.0, original_context=2048)
    llama3 = RopeSpec(128, 5e5, "llama3", factor=32.0, original_context=8192)
    yarn = RopeSpec(128, 1e6, "yarn", factor=4.0, original_context=32768)
    return [
        (RopeSpec(64), 10),
        (RopeSpec(32, 1e6), 10),  # of a head of 64: partial
        (RopeSpec(80, 1e4, "linear", factor=8.0), 10),
        (dynamic, 1),
        (dynamic, 2048),
        (dynamic, 2049),
        (dynamic, 7000),
        (llama3, 10),
        (dataclasses.replace(llama3, factor=8.0, low_freq_factor=2.0, high_freq_factor=16.0), 10),
        (yarn, 10),
        (dataclasses.replace(yarn, beta_fast=16.0, beta_slow=2.0, truncate=False), 10),
        (dataclasses.replace(yarn, mscale=1.0, mscale_all_dim=0.7, factor=40.0), 10),
        (dataclasses.replace(yarn, attention_factor=0.9), 10),
        (dataclasses.replace(yarn, factor=1.0), 10),
        (longrope, 4096),
        (longrope, 4097),
        (dataclasses.replace(longrope, attention_factor=1.25), 10),
        (dataclasses.replace(longrope, factor=1.0), 10),
    ]


def by_transformers(rope: RopeSpec, length: int) -> tuple[list[float], float]:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters: dict[str, Any] = {
        "rope_type": rope.kind,
        "rope_theta": rope.theta,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_context,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "truncate": rope.truncate,
        "short_factor": list(rope.short_factor),
        "long_factor": list(rope.long_factor),
        "attention_factor": rope.attention_factor,
    }
    config = LlamaConfig(
        hidden_size=rope.dim * 2,
        num_attention_heads=2,
        head_dim=rope.dim,
        max_position_embeddings=rope.original_context if rope.kind == "dynamic" else POSITIONS,
        rope_parameters=parameters,
    )
    if rope.kind == "default":
        compute = LlamaRotaryEmbedding.compute_default_rope_parameters
    else:
        compute = ROPE_INIT_FUNCTIONS[rope.kind]
    inv_freq, factor = compute(config, device="cpu", seq_len=torch.tensor(length))
    return inv_freq.tolist(), float(factor)


if __name__ == "__main__":
    rows = [json.dumps(by_transformers(*case)) for case in cases()]
    GOLDEN.write_text("[\n" + ",\n".join(rows) + "\n]\n")
