"""The reference program's memory: what it says beforehand against what MLX counts."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest

from localllm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec, RopeSpec
from localllm.train.base import weights_in_memory
from localllm.train.layout import initial, layout_for
from localllm.train.lora import FullConfig, LoRAConfig, TuneConfig
from localllm.train.program import Noise, Rows
from localllm.train.reference import ReferenceProgram
from tests.backend.random_models import random_weights


def model(layers: int, vocab: int, ffn: int) -> DecoderSpec:
    attn = AttentionSpec(6, 2, 32, 0.2, RopeSpec(32))
    layer = LayerSpec(attn, FeedForwardSpec(ffn), NormSpec())
    return DecoderSpec("llama", vocab, 192, (layer,) * layers, NormSpec(), 4096, True)


def measured(
    spec: DecoderSpec, config: TuneConfig, sizes: list[int], counted: int | None = None
) -> tuple[int, int]:
    """Bytes planned, and bytes taken by one step. counted: rows that have a weight."""
    base = weights_in_memory(spec, random_weights(spec))
    layout = layout_for(spec, config)
    dropout = config.dropout if isinstance(config, LoRAConfig) else 0.0
    program = ReferenceProgram(base, layout, dropout=dropout)
    parameters = initial(layout, 0, base)
    gradient = np.zeros_like(parameters)
    count = sum(sizes)
    tokens, targets = np.random.default_rng(0).integers(0, spec.vocab_size, (2, count))
    edges = np.cumsum([0, *sizes]).astype(np.int32)
    rows = Rows(tokens.astype(np.int32), targets.astype(np.int32), edges)
    weights = np.full(count, 1 / count, np.float32)
    if counted is not None:
        weights[counted:] = 0
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    program.gradients(rows, weights, parameters, gradient, Noise(1, dropout))
    return program.working_bytes(sizes), mx.get_peak_memory() - before


@pytest.mark.parametrize(
    ("config", "sizes", "layers", "vocab", "ffn"),
    [
        (LoRAConfig(), [256] * 3, 2, 1000, 512),
        pytest.param(LoRAConfig(), [700], 2, 1000, 512, marks=pytest.mark.slow),
        pytest.param(LoRAConfig(), [64] * 10, 8, 1000, 512, marks=pytest.mark.slow),
        pytest.param(LoRAConfig(), [128] * 4, 2, 1000, 1536, marks=pytest.mark.slow),
        (LoRAConfig(dropout=0.1), [128] * 4, 2, 1000, 512),
        (LoRAConfig(dora=True), [128] * 4, 2, 1000, 512),
        pytest.param(LoRAConfig(), [256], 2, 30000, 512, marks=pytest.mark.slow),
        (FullConfig(), [200], 2, 1000, 512),
        (FullConfig(), [64], 2, 30000, 512),
    ],
)
def test_the_plan_covers_the_peak_and_not_twice_over(config, sizes, layers, vocab, ffn):
    planned, taken = measured(model(layers, vocab, ffn), config, sizes)
    assert taken <= 1.05 * planned
    assert planned <= 2.2 * taken


def test_logits_are_never_held_for_all_rows():
    """600 rows of 40,000 logits would be 96 MB alone."""
    _, taken = measured(model(1, 40_000, 64), LoRAConfig(rank=1), [600])
    assert taken < 90e6


def test_rows_without_weight_take_no_head():
    spec = model(1, 40_000, 64)
    _, all_rows = measured(spec, LoRAConfig(rank=1), [200])
    _, few = measured(spec, LoRAConfig(rank=1), [200], counted=2)
    assert few < all_rows - 30e6  # half of 198 rows' logits
