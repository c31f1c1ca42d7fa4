"""A native step under MLX's own differentiation and optimizers."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from localllm.train.mlx_bridge import loss_function, to_flat, to_parameters
from localllm.train.native import NativeProgram
from localllm.train.program import Noise
from tests.train.native_case import (
    Held,
    make_layout,
    random_parameters,
    random_rows,
    random_weights,
    small_spec,
)

SPEC = small_spec()
LAYOUT = make_layout(SPEC)
ROWS = random_rows(SPEC, (9, 20))
WEIGHTS = np.full(29, 1 / 29, np.float32)


@pytest.fixture
def program():
    made = NativeProgram(SPEC, Held(random_weights(SPEC)), LAYOUT, threads=1, kernels="scalar")
    yield made
    made.close()


def test_value_and_grad_gives_the_programs_own_loss_and_gradient(program):
    flat, noise = random_parameters(LAYOUT), Noise(seed=3, dropout=0.2)
    gradient = np.zeros_like(flat)
    loss = program.gradients(ROWS, WEIGHTS, flat, gradient, noise)
    function = loss_function(program, ROWS, WEIGHTS, noise)
    value, gradients = mx.value_and_grad(function)(to_parameters(LAYOUT, flat))
    assert value.item() == np.float32(loss)
    assert np.array_equal(to_flat(LAYOUT, gradients), gradient)
    assert {name: tuple(x.shape) for name, x in gradients.items()} == dict(LAYOUT.shapes)


def test_the_chain_rule_goes_on_through_the_loss(program):
    parameters = to_parameters(LAYOUT, random_parameters(LAYOUT))
    function = loss_function(program, ROWS, WEIGHTS)
    value, once = mx.value_and_grad(function)(parameters)
    squared = mx.grad(lambda p: function(p) ** 2)(parameters)
    for name, wanted in once.items():
        assert np.allclose(np.array(squared[name]), 2 * value.item() * np.array(wanted), rtol=1e-5)


def test_an_mlx_optimizer_lowers_the_loss(program):
    parameters = to_parameters(LAYOUT, random_parameters(LAYOUT))
    function = loss_function(program, ROWS, WEIGHTS)
    optimizer = optim.AdamW(learning_rate=0.01)
    losses = []
    for _ in range(8):
        value, gradients = mx.value_and_grad(function)(parameters)
        parameters = optimizer.apply_gradients(gradients, parameters)
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]


def test_flat_and_dict_hold_the_same(program):
    flat = random_parameters(LAYOUT)
    assert np.array_equal(to_flat(LAYOUT, to_parameters(LAYOUT, flat)), flat)
