"""Native training of all weights: the gradients of the reference, and bits that do not vary."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings

from localllm.errors import CheckpointError
from localllm.spec import NormSpec, RopeSpec
from localllm.train.base import weights_in_memory
from localllm.train.layout import initial, layout_for
from localllm.train.lora import FullConfig
from localllm.train.mlx_bridge import loss_function, to_flat, to_parameters
from localllm.train.native import NativeProgram
from localllm.train.optimizers import clip, make_optimizer
from localllm.train.program import Layout, Noise
from localllm.train.programs import open_program
from localllm.train.reference import ReferenceProgram
from tests.examples import examples
from tests.train.native_case import (
    Held,
    check_added,
    check_micro_batches,
    check_rows_without_weight,
    check_same_bits,
    gradient,
    random_rows,
    random_weights,
    relative,
    small_spec,
    some_weights,
)
from tests.train.test_native import EXACT, FLOAT, KERNELS, LONG, ROUNDED, SPECS

NEFTUNE = Noise(seed=(7 << 32) + 9, neftune=5.0)


def whole(spec) -> Layout:
    return layout_for(spec, FullConfig())


def opened(spec, tensors=None, **options) -> NativeProgram:
    tensors = random_weights(spec) if tensors is None else tensors
    return NativeProgram(spec, Held(tensors), whole(spec), **{"threads": 1, **options})


def start(spec, seed: int = 0) -> np.ndarray:
    return initial(whole(spec), 0, weights_in_memory(spec, random_weights(spec, seed)))


@pytest.mark.parametrize("name", SPECS)
def test_gradients_of_all_weights_are_those_of_the_reference(name):
    spec = SPECS[name]
    layout, parameters = whole(spec), start(spec, seed=1)
    base = weights_in_memory(spec, random_weights(spec))
    rows, weights = random_rows(spec, LONG, first=5), some_weights(sum(LONG))
    reference = ReferenceProgram(base, layout)
    for noise in (None, NEFTUNE):
        wanted = reference.log_probs(rows, parameters, noise)
        loss_wanted, slope = gradient(reference, rows, weights, parameters, noise)
        for kernels in FLOAT if name == "relu" else KERNELS:
            bound = EXACT if kernels in FLOAT else ROUNDED
            program = opened(spec, kernels=kernels)
            assert relative(program.log_probs(rows, parameters, noise), wanted) < bound
            loss, got = gradient(program, rows, weights, parameters, noise)
            assert abs(loss - loss_wanted) < bound * float(np.abs(weights * wanted).sum())
            assert relative(got, slope) < bound
            if kernels in FLOAT:
                compare_each(layout, got, slope)
            program.close()


def compare_each(layout: Layout, got: np.ndarray, wanted: np.ndarray) -> None:
    """No parameter is wrong behind larger ones: each within 1e-4 of its own gradient."""
    found = layout.views(got)
    size = float(np.linalg.norm(wanted)) / len(found) ** 0.5
    for name, value in layout.views(wanted).items():
        error = float(np.linalg.norm(found[name].astype(np.float64) - value))
        # A key's bias moves all scores of a query alike: its gradient is zero but for rounding.
        assert error <= 1e-4 * float(np.linalg.norm(value)) + 1e-6 * size, name


def test_finite_differences_agree():
    spec = SPECS["qwen"]
    layout, parameters, program = whole(spec), start(spec), opened(spec, kernels=FLOAT[-1])
    rows, weights = random_rows(spec, (9, 20)), some_weights(29)
    _, slope = gradient(program, rows, weights, parameters)

    def loss(flat: np.ndarray) -> float:
        log_probs = program.log_probs(rows, flat).astype(np.float64)
        return -float(weights.astype(np.float64) @ log_probs)

    random = np.random.default_rng(5)
    for name, at in layout.places.items():
        count = int(np.prod(layout.shapes[name]))
        direction = np.zeros(layout.size, np.float32)
        direction[at : at + count] = random.normal(size=count) * 3e-3
        up, down = loss(parameters + direction), loss(parameters - direction)
        step = (parameters + direction).astype(np.float64) - (parameters - direction)
        size = float(np.linalg.norm(step) * np.linalg.norm(slope[at : at + count]))
        # Of third order in the step, and what is left of rounding after the difference.
        assert abs(up - down - float(step @ slope)) < 0.02 * size + 2e-4, name


@settings(max_examples=examples(25), deadline=None)
@given(data=st.data())
def test_any_sizes_and_lengths_give_the_gradients_of_the_reference(data):
    heads = data.draw(st.integers(1, 4))
    spec = small_spec(
        hidden=data.draw(st.integers(16, 70)),  # fewer make norms too steep for float32
        vocab=data.draw(st.sampled_from([2, 70, 1537])),
        heads=heads,
        kv_heads=data.draw(st.sampled_from([n for n in (1, 2, 3, 4) if heads % n == 0])),
        head_dim=2 * data.draw(st.integers(1, 20)),
        ffn=data.draw(st.integers(1, 100)),
        rope=RopeSpec(dim=2),
        window=data.draw(st.none() | st.integers(1, 60)),
        bias=data.draw(st.booleans()),
        tied_head=data.draw(st.booleans()),
        head_bias=data.draw(st.booleans()),
    )
    lengths = tuple(data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=4)))
    kernels = data.draw(st.sampled_from(KERNELS))
    rows, parameters = random_rows(spec, lengths), start(spec)
    weights = np.random.default_rng(4).normal(size=sum(lengths)).astype(np.float32)
    reference = ReferenceProgram(weights_in_memory(spec, random_weights(spec)), whole(spec))
    _, wanted = gradient(reference, rows, weights, parameters)
    _, got = gradient(opened(spec, kernels=kernels), rows, weights, parameters)
    # Sums over rows may cancel: an error is small beside their terms, not always beside the sum.
    terms = float(np.linalg.norm(wanted)) + 0.05 * float(np.abs(weights).sum())
    error = float(np.linalg.norm(got - wanted.astype(np.float64)))
    assert error <= (EXACT if kernels in FLOAT else ROUNDED) * terms


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["qwen", "gemma 2", "gpt-2"])
def test_threads_and_what_is_kept_change_no_bit(name, kernels):
    spec = SPECS[name]
    rows, parameters = random_rows(spec, (120, 1, 60, 40)), start(spec)
    check_same_bits(partial(opened, spec, kernels=kernels), rows, parameters, NEFTUNE)


@pytest.mark.parametrize("kernels", KERNELS)
def test_cutting_a_step_into_micro_batches_changes_the_order_of_the_sum_alone(kernels):
    spec = SPECS["llama"]
    parameters, program = start(spec), opened(spec, kernels=kernels)
    # Slopes of bfloat16 are rounded by row, so cutting changes none of them.
    check_micro_batches(program, spec, parameters, NEFTUNE)


def test_a_step_of_several_groups_is_the_sum_of_theirs():
    """1,300 rows do not go at once; the head's and every layer's sums go on from group to group."""
    spec = SPECS["odd sizes"]
    parameters, lengths = start(spec), (500, 480, 320)
    rows, weights = random_rows(spec, lengths), some_weights(1300)
    base = weights_in_memory(spec, random_weights(spec))
    _, wanted = gradient(ReferenceProgram(base, whole(spec)), rows, weights, parameters)
    for kernels in KERNELS:
        _, got = gradient(opened(spec, kernels=kernels, threads=2), rows, weights, parameters)
        assert relative(got, wanted) < (EXACT if kernels in FLOAT else ROUNDED)


def test_the_parameters_of_each_call_count_and_the_base_stays():
    spec = SPECS["gemma 3"]
    first, second = start(spec, seed=1), start(spec, seed=2)
    rows, weights = random_rows(spec, (30,)), some_weights(30)
    program, again = opened(spec, kernels=FLOAT[-1]), opened(spec, kernels=FLOAT[-1])
    base = program.log_probs(rows, None)
    assert np.array_equal(base, program.log_probs(rows, start(spec)))
    _, of_first = gradient(program, rows, weights, first)
    _, of_second = gradient(program, rows, weights, second)
    assert np.array_equal(of_second, gradient(again, rows, weights, second)[1])
    assert not np.array_equal(of_first, of_second)
    first += np.float32(0.01)  # in place, as an optimizer does
    assert np.array_equal(program.log_probs(rows, first), again.log_probs(rows, first.copy()))
    assert np.array_equal(base, program.log_probs(rows, None))


def test_gradients_are_added_to_what_is_there():
    spec = SPECS["gpt-2"]
    parameters, program = start(spec), opened(spec)
    check_added(program, spec, parameters, 1e-4)


def test_rows_without_weight_count_for_nothing():
    spec = SPECS["llama"]
    parameters, program = start(spec), opened(spec)
    rows = random_rows(spec, (30, 8))
    weights = some_weights(38)
    weights[30:] = 0
    changed = replace(rows, tokens=rows.tokens.copy(), targets=rows.targets.copy())
    changed.targets[weights == 0] = 0
    changed.tokens[30:] = 0
    check_rows_without_weight(program, rows, changed, weights, parameters)


def test_without_a_base_weights_are_not_read():
    spec = SPECS["llama"]
    program = opened(spec, {}, with_base=False)
    rows = random_rows(spec, (5,))
    assert np.isfinite(program.log_probs(rows, start(spec))).all()
    with pytest.raises(AssertionError, match="without a base"):
        program.log_probs(rows, None)


def test_a_missing_weight_is_told_before_the_first_step():
    spec = SPECS["llama"]
    tensors = random_weights(spec)
    del tensors["layers.1.ffn.up.weight"]
    with pytest.raises(CheckpointError, match="missing"):
        initial(whole(spec), 0, weights_in_memory(spec, tensors))


def test_parameters_of_another_size_are_refused():
    spec = SPECS["llama"]
    program, rows = opened(spec), random_rows(spec, (4,))
    with pytest.raises(ValueError, match="size"):
        program.log_probs(rows, start(spec)[1:])


@pytest.mark.parametrize("name", ["llama", "gemma 3", "gpt-2"])
def test_a_run_takes_the_native_program_for_all_weights(name):
    spec = SPECS[name]
    weights = weights_in_memory(spec, random_weights(spec))
    program, note = open_program(weights, whole(spec), FullConfig(), threads=1)
    assert (program.name, note) == ("native", None)


def test_what_is_not_covered_goes_to_the_reference_program():
    spec = small_spec()
    layer = spec.layers[0]
    sinks = replace(spec, layers=(replace(layer, mixer=replace(layer.mixer, sinks=True)),))
    weights = weights_in_memory(sinks, random_weights(sinks))
    program, note = open_program(weights, whole(sinks), FullConfig())
    assert program.name == "reference"
    assert "sinks" in note


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "lion", "adafactor", "sgd"])
def test_every_optimizer_lowers_the_loss(name):
    spec = small_spec(norm=NormSpec(eps=1e-5))
    program, parameters = opened(spec), start(spec)
    optimizer = make_optimizer(name, whole(spec))
    rows, weights = random_rows(spec, (9, 20)), np.full(29, 1 / 29, np.float32)
    rate = {"lion": 1e-3, "sgd": 0.3, "adafactor": 1e-2}.get(name, 3e-3)
    losses = []
    for step in range(1, 31):
        loss, slope = gradient(program, rows, weights, parameters)
        losses.append(loss)
        clip(slope, 1.0)
        optimizer.update(parameters, slope, rate, step)
    assert losses[-1] < 0.7 * losses[0]


def test_mlx_s_own_optimizers_train_all_weights():
    spec = SPECS["qwen"]
    layout, program = whole(spec), opened(spec, kernels="scalar")
    rows, weights = random_rows(spec, (9, 20)), np.full(29, 1 / 29, np.float32)
    flat = start(spec)
    loss, slope = gradient(program, rows, weights, flat)
    function = loss_function(program, rows, weights)
    parameters = to_parameters(layout, flat)
    value, found = mx.value_and_grad(function)(parameters)
    assert value.item() == np.float32(loss)
    assert np.array_equal(to_flat(layout, found), slope)
    optimizer, losses = optim.AdamW(learning_rate=3e-3), []
    for _ in range(10):
        value, found = mx.value_and_grad(function)(parameters)
        parameters = optimizer.apply_gradients(found, parameters)
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]


MEASURE = """
import numpy as np
from tests.train.native_case import *
from tests.train.test_native_whole import start, whole
from localllm.train.native import NativeProgram

def resident():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024

spec = small_spec(hidden=256, ffn=768, heads=4, head_dim=64, layers=6, vocab=4000, tied_head={tied})
parameters, rows = start(spec), random_rows(spec, ({rows},))
weights, gradient = np.ones({rows}, np.float32), np.ones_like(parameters)
program = NativeProgram(
    spec, Held(random_weights(spec)), whole(spec), threads=1, keep_bytes={keep}, with_base={base}
)
before = resident()
if {base}:
    program.log_probs(rows, None)
program.gradients(rows, weights, parameters, gradient)
print(resident() - before, program.working_bytes([{rows}]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("keep", "tied", "base"), [(0, True, False), (1 << 30, False, False), (0, True, True)]
)
def test_the_memory_planned_is_what_a_step_takes(keep, tied, base):
    command = [sys.executable, "-c", MEASURE.format(rows=900, keep=keep, tied=tied, base=base)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    taken, planned = map(int, done.stdout.split())
    assert abs(taken - planned) < 0.1 * planned
