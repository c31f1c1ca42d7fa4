"""RoPE scaling of GGUF files: metadata, and the tensors of factors that some have."""

from __future__ import annotations

import math
from typing import Any

from localllm.checkpoint.base import Checkpoint
from localllm.errors import CheckpointError
from localllm.models.config import MAX_CONTEXT, Config


def rope_scaling(checkpoint: Checkpoint, meta: Config, rotated: int) -> dict[str, Any] | None:
    """As `rope_scaling` of a Hugging Face config. rotated: entries of each head that turn.

    Frequencies divided by factors of their own (Llama 3, LongRoPE) are `longrope`.
    """
    kind = meta.text("rope.scaling.type", "linear")
    old = meta.number("rope.scale_linear", 1.0)
    factor = meta.number("rope.scaling.factor", old, above=-1e-9) or 1.0
    strength = meta.number("rope.scaling.attn_factor", 1.0)
    context = meta.integer("context_length", high=MAX_CONTEXT)
    original = meta.integer("rope.scaling.original_context_length", context, high=MAX_CONTEXT)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise meta.unsupported("rope.scaling.type", kind)
    if kind == "none":
        factor = 1.0
    factors = _rope_factors(checkpoint, meta, rotated)
    if factors:
        if kind == "yarn":
            raise meta.unsupported("rope.scaling.type", "yarn with rope_freqs")
        slower = factor if kind == "linear" else 1.0
        return {
            "rope_type": "longrope",
            "short_factor": [x * slower for x in factors[0]],
            "long_factor": [x * slower for x in factors[1]],
            "original_max_position_embeddings": original,
            "attention_factor": strength,
        }
    if kind == "longrope":
        raise CheckpointError(f"{meta.source}: rope_factors_long.weight is missing")
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": meta.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": meta.number("rope.scaling.yarn_beta_slow", 1.0),
            "attention_factor": strength * _yarn_strength(meta, factor),
        }
    if factor == 1.0:
        return None
    return {"rope_type": "linear", "factor": factor}


def _yarn_strength(meta: Config, factor: float) -> float:
    """llama.cpp: the ratio of two mscales, the second 1 unless the file has a multiplier."""

    def mscale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    by = meta.number("rope.scaling.yarn_log_multiplier", 0.0, above=-1e-9)
    return mscale(1.0) / mscale(by) if by else mscale(1.0)


def _rope_factors(
    checkpoint: Checkpoint, meta: Config, rotated: int
) -> tuple[list[float], list[float]] | None:
    """What frequencies are divided by, within the original context and beyond it."""

    def read(name: str) -> list[float]:
        if name not in checkpoint:
            raise CheckpointError(f"{meta.source}: {name} is missing")
        if (shape := checkpoint.shape(name)) != (rotated // 2,):
            raise CheckpointError(
                f"{meta.source}: {name} has the shape {list(shape)}; "
                f"{rotated} rotated entries call for {[rotated // 2]}"
            )
        values: list[float] = checkpoint.tensor(name).to_float32().tolist()
        return values

    if "rope_freqs.weight" in checkpoint:  # Llama 3
        factors = read("rope_freqs.weight")
        return factors, factors
    names = ("rope_factors_short.weight", "rope_factors_long.weight")
    if any(name in checkpoint for name in names):
        return read(names[0]), read(names[1])
    return None
