"""Losses and gradients against torch, transformers and PEFT; see scripts/goldens/training.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from localllm.checkpoint import open_checkpoint
from localllm.models import load_weights
from localllm.train.base import BaseWeights, base_weights
from localllm.train.layout import initial, layout_for
from localllm.train.lora import FullConfig, LoRAConfig
from localllm.train.methods import make_method
from localllm.train.program import Layout, Rows
from localllm.train.reference import ReferenceProgram
from tests.models.running import golden
from tests.models.tiny import write_checkpoint
from tests.train.cases import (
    ADAPTERS,
    GOLDEN,
    PREFERENCES,
    adapter_values,
    along,
    directions,
    kinds_of,
    pairs_of,
    ragged,
)

EXPECTED = json.loads(GOLDEN.read_text())
_MODULES = {"attn": "self_attn", "ffn": "mlp"}
_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}


def peft_name(name: str) -> str:
    """PEFT's name of one of our adapter parameters, in a model with Llama's names."""
    _, layer, group, linear, part = name.split(".")
    module = f"{_MODULES[group]}.{linear}_proj"
    return f"base_model.model.model.layers.{layer}.{module}.{_PARTS[part]}"


def laid_out(case) -> tuple[Rows, np.ndarray]:
    parts = ragged(case)
    tokens, targets, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    edges = np.cumsum([0, *(len(part[0]) for part in parts)]).astype(np.int32)
    return Rows(tokens, targets, edges), weights


@pytest.mark.parametrize("name", EXPECTED["full"])
def test_every_architecture_has_the_gradients_of_transformers(name, tmp_path):
    """Each kind of tensor by itself, through the names and orders of the checkpoint."""
    case = golden(name)
    base = base_weights(case.write(tmp_path / "model"))
    layout = layout_for(base.spec, FullConfig())
    rows, weights = laid_out(case)
    gradient = np.zeros(layout.size, np.float32)
    program = ReferenceProgram(base, layout)
    loss = program.gradients(rows, weights, initial(layout, 0, base), gradient)
    expected = EXPECTED["full"][name]
    floor = float(np.linalg.norm(gradient))
    assert loss == pytest.approx(expected["loss"], rel=1e-4, abs=1e-4)
    for kind, tensors in kinds_of(case.shapes).items():
        wanted = expected["gradients"][kind]
        write_checkpoint(tmp_path / "along", case.config, along(case.shapes, tensors))
        direction = direction_of(tmp_path / "along", base, layout)
        product = gradient * direction
        # Cancelling terms leave the rounding of what they were, as in a router whose one choice
        # always weighs 1.
        size = float(np.linalg.norm(product)) + 1e-3 * floor
        found = float(product.astype(np.float64).sum())
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-3 * size), kind


@pytest.mark.parametrize(
    "name", ["gemma4-per-layer-shared", "gemma4-experts", "glm4_moe-one-dense"]
)
@pytest.mark.parametrize("targets", ["all-linear", ("k_proj",), ("o_proj",)])
def test_adapters_have_the_slope_of_their_loss(name, targets, tmp_path):
    """Also through keys that later layers share, and past experts."""
    case = golden(name)
    base = base_weights(case.write(tmp_path))
    layout = layout_for(base.spec, LoRAConfig(rank=3, targets=targets))
    rows, weights = laid_out(case)
    program, rng = ReferenceProgram(base, layout), np.random.default_rng(0)
    start = (initial(layout, 0, base) + 0.1 * rng.normal(size=layout.size)).astype(np.float32)
    gradient = np.zeros(layout.size, np.float32)
    program.gradients(rows, weights, start, gradient)
    along = gradient / np.linalg.norm(gradient)

    def loss(step: float) -> float:
        moved = (start + step * along).astype(np.float32)
        return float(-(weights * program.log_probs(rows, moved)).astype(np.float64).sum())

    slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    assert slope == pytest.approx(float(np.linalg.norm(gradient)), rel=0.02)


def direction_of(path: Path, base: BaseWeights, layout: Layout) -> np.ndarray:
    checkpoint = open_checkpoint(path)
    flat = np.zeros(layout.size, np.float32)
    try:
        views = layout.views(flat)
        for name, tensor in load_weights(checkpoint, base.spec):
            views[name][...] = tensor.to_float32()
    finally:
        checkpoint.close()
    return flat


@pytest.fixture(params=ADAPTERS)
def adapted(request, tmp_path):
    """A program with an adapter under way, and what PEFT says of it."""
    case = ADAPTERS[request.param]
    model = golden(case.model)
    base = base_weights(model.write(tmp_path))
    layout = layout_for(base.spec, LoRAConfig(**case.ours))
    names = {peft_name(name): name for name in layout.shapes}
    parameters = initial(layout, 0, base)
    views = layout.views(parameters)
    for name, value in adapter_values({n: layout.shapes[o] for n, o in names.items()}).items():
        start = views[names[name]] if "magnitude" in name else 1
        views[names[name]][...] = start * value
    program = ReferenceProgram(base, layout)
    return program, parameters, model, EXPECTED["adapters"][request.param]


def check(layout: Layout, gradient: np.ndarray, expected: dict[str, float]) -> None:
    names = {peft_name(name): name for name in layout.shapes}
    assert expected.keys() == names.keys()
    wanted = directions({name: layout.shapes[own] for name, own in names.items()})
    views = layout.views(gradient)
    for name, own in names.items():
        product = views[own].astype(np.float64) * wanted[name]
        size = float(np.linalg.norm(product))
        assert float(product.sum()) == pytest.approx(expected[name], rel=5e-4, abs=5e-4 * size), own


def test_adapters_have_the_gradients_of_peft(adapted):
    program, parameters, model, expected = adapted
    rows, weights = laid_out(model)
    gradient = np.zeros(program.layout.size, np.float32)
    loss = program.gradients(rows, weights, parameters, gradient)
    assert loss == pytest.approx(expected["sft"]["loss"], rel=2e-5)
    check(program.layout, gradient, expected["sft"]["gradients"])


@pytest.mark.parametrize("kind", PREFERENCES)
@pytest.mark.parametrize("size", [2, 1])
def test_preference_methods_have_the_losses_and_gradients_of_torch(adapted, kind, size):
    """In one micro-batch or in two: a step's losses and gradients add up."""
    program, parameters, model, expected = adapted
    method = make_method(kind.split("-")[0], **PREFERENCES[kind])
    pairs, total, loss, row = pairs_of(model), 2, 0.0, 0
    gradient = np.zeros(program.layout.size, np.float32)
    for at in range(0, len(pairs), size):
        batch = method.step_rows(pairs[at : at + size], row)
        row += batch.tokens
        found = method.weights(
            batch,
            total,
            program.log_probs(batch.rows, parameters),
            program.log_probs(batch.rows, None),
        )
        loss += found.loss
        program.gradients(batch.rows, found.weights, parameters, gradient)
    assert loss == pytest.approx(expected[kind]["loss"], rel=2e-5)
    check(program.layout, gradient, expected[kind]["gradients"])
