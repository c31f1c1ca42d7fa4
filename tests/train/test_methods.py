"""Methods: what they weigh, and that a step may be cut into any micro-batches."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import InvalidRequest
from localllm.train.base import weights_in_memory
from localllm.train.layout import initial, layout_for
from localllm.train.lora import LoRAConfig
from localllm.train.methods import METHODS, make_method
from localllm.train.reference import ReferenceProgram
from tests.backend.random_models import llama, random_weights
from tests.train.cases import Pair, Side

PREFERENCE = [name for name in METHODS if name != "sft"]


def side(rng: np.random.Generator, prompt: int, answer: int) -> Side:
    trained = np.array([False] * prompt + [True] * answer)
    return Side(rng.integers(0, 96, prompt + answer).astype(np.int32), trained)


def pairs(count: int, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt = int(rng.integers(1, 5))
        sides = (side(rng, prompt, int(rng.integers(1, 7))) for _ in range(2))
        made.append(Pair(*sides))
    return made


def test_rows_are_all_tokens_but_the_last_and_count_where_the_next_is_trained():
    examples = [
        Side(np.array([5, 6, 7, 8], np.int32), np.array([False, False, True, False])),
        Side(np.array([9], np.int32), np.array([False])),
        Side(np.array([1, 2], np.int32), np.array([False, True])),
    ]
    batch = make_method("sft").step_rows(examples, first_row=40)
    assert batch.rows.tokens.tolist() == [5, 6, 7, 1]
    assert batch.rows.targets.tolist() == [6, 7, 8, 2]
    assert batch.rows.offsets.tolist() == [0, 3, 3, 4]
    assert batch.rows.first_row == 40
    assert batch.counted.tolist() == [False, True, False, True]
    assert (batch.tokens, batch.trained) == (4, 2)
    assert make_method("sft").count(examples) == 2


def test_supervised_weights_are_one_over_the_steps_trained_tokens():
    example = Side(np.arange(4, dtype=np.int32), np.array([False, True, False, True]))
    method = make_method("sft")
    batch = method.step_rows([example])
    found = method.weights(batch, total=8)
    assert found.weights.tolist() == [0.125, 0, 0.125]
    assert found.loss is None
    log_probs = np.array([-2, -100, -4], np.float32)
    assert method.weights(batch, 8, log_probs).loss == pytest.approx(6 / 8)


@pytest.mark.parametrize("name", PREFERENCE)
@given(st.integers(0, 1000), st.lists(st.integers(0, 5), max_size=4))
def test_a_step_weighs_its_rows_alike_however_it_is_cut(name, seed, cuts):
    items = pairs(6, seed)
    method = make_method(name)
    rng = np.random.default_rng(seed)
    whole = method.step_rows(items)
    log_probs, base = -rng.gamma(2, 1, (2, whole.tokens)).astype(np.float32)
    expected = method.weights(whole, 6, log_probs, base)
    weights, losses, row = [], [], 0
    metrics: dict[str, float] = {}
    edges = [0, *sorted(set(cuts) - {0}), 6]
    for first, last in pairwise(edges):
        batch = method.step_rows(items[first:last], row)
        here = slice(row, row + batch.tokens)
        found = method.weights(batch, 6, log_probs[here], base[here])
        row = here.stop
        weights.append(found.weights)
        losses.append(found.loss)
        for key, value in found.metrics.items():
            metrics[key] = metrics.get(key, 0.0) + value
    assert np.array_equal(np.concatenate(weights), expected.weights)
    assert sum(losses) == pytest.approx(expected.loss)
    assert metrics == pytest.approx(dict(expected.metrics))


@pytest.mark.parametrize("name", PREFERENCE)
@given(st.integers(0, 1000))
def test_weights_are_minus_the_losses_derivatives(name, seed):
    """Central differences in float64 through the method's own loss, row by row."""
    settings = {"beta": 0.7, **({"label_smoothing": 0.1} if name == "dpo" else {})}
    method = make_method(name, **settings)
    batch = method.step_rows(pairs(2, seed))
    rng = np.random.default_rng(seed)
    log_probs, base = -rng.gamma(2, 1, (2, batch.tokens))
    found = method.weights(batch, 2, log_probs, base)
    for row in range(batch.tokens):
        moved = np.zeros(batch.tokens)
        moved[row] = 1e-6
        up = method.weights(batch, 2, log_probs + moved, base).loss
        down = method.weights(batch, 2, log_probs - moved, base).loss
        slope = (up - down) / 2e-6
        assert found.weights[row] == pytest.approx(-slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_first_step_of_dpo_has_loss_ln_2_and_no_margin(dora, smoothing):
    """The reference is the base with the adapter off, and the adapter begins as nothing."""
    spec = llama()
    base = weights_in_memory(spec, random_weights(spec))
    layout = layout_for(spec, LoRAConfig(dora=dora))
    program = ReferenceProgram(base, layout)
    method = make_method("dpo", label_smoothing=smoothing)
    batch = method.step_rows(pairs(3))
    start = initial(layout, 0, base)
    found = method.weights(
        batch, 3, program.log_probs(batch.rows, start), program.log_probs(batch.rows, None)
    )
    assert found.loss == pytest.approx(math.log(2), abs=1e-15)
    assert found.metrics["rewards/margin"] == 0.0
    assert found.metrics["rewards/accuracy"] == 0.0
    gradient = np.zeros(layout.size, np.float32)
    program.gradients(batch.rows, found.weights, start, gradient)
    assert gradient.any()


def test_dpo_rewards_tell_the_better_answer():
    method = make_method("dpo", beta=0.5)
    batch = method.step_rows(pairs(1))
    base = np.full(batch.tokens, -2, np.float32)
    better = base.copy()
    chosen = np.flatnonzero(batch.counted[: batch.rows.offsets[1]])
    better[chosen] += 1
    found = method.weights(batch, 1, better, base)
    assert found.metrics["rewards/chosen"] == pytest.approx(0.5 * len(chosen))
    assert found.metrics["rewards/rejected"] == 0.0
    assert found.metrics["rewards/accuracy"] == 1.0
    assert found.loss < math.log(2)


def test_orpo_of_an_answer_that_is_certain_stays_finite():
    method = make_method("orpo")
    batch = method.step_rows(pairs(1))
    found = method.weights(batch, 1, np.zeros(batch.tokens, np.float32))
    assert np.isfinite(found.weights).all()
    assert math.isfinite(found.loss)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("ppo", {}, "no method 'ppo'"),
        ("sft", {"beta": 0.1}, "has no setting 'beta'"),
        ("orpo", {"label_smoothing": 0.1}, "has no setting 'label_smoothing'"),
        ("dpo", {"beta": 0.0}, "beta must be above 0"),
        ("dpo", {"label_smoothing": 0.5}, "below 0.5"),
    ],
)
def test_nonsense_is_refused_by_name(name, settings, words):
    with pytest.raises(InvalidRequest, match=words):
        make_method(name, **settings)
