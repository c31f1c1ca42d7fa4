"""SmolLM2 in 4 bits on the reference program: finite differences, and a few steps that learn."""

from __future__ import annotations

import numpy as np
import pytest

from localllm.train.base import base_weights
from localllm.train.layout import initial, layout_for
from localllm.train.lora import LoRAConfig
from localllm.train.methods import make_method
from localllm.train.optimizers import clip, make_optimizer
from localllm.train.programs import open_program
from tests.train.cases import Side

pytestmark = pytest.mark.slow


def test_an_adapter_on_4_bits_learns_and_its_gradient_is_the_losses_slope(smollm2):
    base, config = base_weights(smollm2), LoRAConfig()
    assert "layers.0.attn.q.weight" in base.quantized
    layout = layout_for(base.spec, config)
    program, _ = open_program(base, layout, config, program="reference")
    method, optimizer = make_method("sft"), make_optimizer("adamw", layout)
    tokens = np.random.default_rng(0).integers(0, 40_000, (2, 20)).astype(np.int32)
    items = [Side(row, np.arange(20) > 0) for row in tokens]
    batch, total = method.step_rows(items), method.count(items)
    weights = method.weights(batch, total).weights
    parameters, losses = initial(layout, 0, base), []
    for step in range(1, 5):
        gradient = np.zeros(layout.size, np.float32)
        losses.append(program.gradients(batch.rows, weights, parameters, gradient))
        norm = clip(gradient, 1.0)
        assert np.isfinite(norm)
        optimizer.update(parameters, gradient, 1e-3, step)
    assert losses[3] < losses[0] - 0.3

    gradient = np.zeros(layout.size, np.float32)
    program.gradients(batch.rows, weights, parameters, gradient)
    length = float(np.linalg.norm(gradient.astype(np.float64)))
    ends = []
    for sign in (1, -1):
        moved = (parameters + sign * 3e-3 / length * gradient).astype(np.float32)
        ends.append(method.weights(batch, total, program.log_probs(batch.rows, moved)).loss)
    assert (ends[0] - ends[1]) / 6e-3 == pytest.approx(length, rel=0.02)
    program.close()
