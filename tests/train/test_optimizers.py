"""Optimizers: each against the formula of its paper, written here once more in float64."""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import CheckpointError, InvalidRequest
from localllm.train.optimizers import OPTIMIZERS, clip, make_optimizer
from localllm.train.optimizers.adamw import adamw, fastest_adamw
from localllm.train.optimizers.adamw8 import BLOCK, SIGNED, UNSIGNED
from localllm.train.program import Layout

LAYOUT = Layout(
    {
        "layers.0.attn.q.a": (4, 300),
        "layers.0.attn.q.b": (70, 4),
        "layers.0.attn.q.magnitude": (70,),
        "layers.0.attn.o.a": (4, 9),
        "layers.0.attn.o.b": (5, 4),
    },
    {"layers.0.attn.q": 2.0, "layers.0.attn.o": 2.0},
)
RATE, DECAY = 3e-3, 0.1


def draws(steps: int, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    start = rng.normal(size=LAYOUT.size).astype(np.float32)
    # Sizes that differ by orders of magnitude, as those of A and B do.
    spread = 10.0 ** rng.uniform(-6, 0, LAYOUT.size)
    return start, [(rng.normal(size=LAYOUT.size) * spread).astype(np.float32) for _ in range(steps)]


def run(name: str, steps: int = 12, **settings) -> np.ndarray:
    optimizer = make_optimizer(name, LAYOUT, **settings)
    parameters, gradients = draws(steps)
    for step, gradient in enumerate(gradients, 1):
        optimizer.update(parameters, gradient, RATE, step)
    return parameters


def by_name(update, steps: int = 12) -> np.ndarray:
    """update(state, name, p, g, step) -> p, in float64, a parameter at a time."""
    start, gradients = draws(steps)
    values = {n: v.astype(np.float64) for n, v in LAYOUT.views(start).items()}
    states: dict[str, dict] = {name: {} for name in values}
    for step, gradient in enumerate(gradients, 1):
        for name, g in LAYOUT.views(gradient).items():
            values[name] = update(states[name], name, values[name], g.astype(np.float64), step)
    return np.concatenate([v.reshape(-1) for v in values.values()])


def test_adamw_is_its_formula():
    def update(state, name, p, g, step):
        m = state["m"] = 0.8 * state.get("m", 0) + 0.2 * g
        v = state["v"] = 0.95 * state.get("v", 0) + 0.05 * g * g
        decay = DECAY if p.ndim > 1 else 0.0
        p = p - RATE * decay * p
        return p - RATE * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-6)

    ours = run("adamw", weight_decay=DECAY, beta1=0.8, beta2=0.95, eps=1e-6)
    np.testing.assert_allclose(ours, by_name(update), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("native", [True, False])
def test_adamw_keeps_to_the_order_of_float32_operations(monkeypatch, native):
    """In the native module and without it."""
    if not native:
        monkeypatch.setitem(sys.modules, "localllm.train.native", None)
    assert (fastest_adamw() is not adamw) == native
    start, gradients = draws(3)
    ours = start.copy()
    optimizer = make_optimizer("adamw", LAYOUT)
    f = np.float32
    m = v = np.zeros(LAYOUT.size, np.float32)
    expected = start.copy()
    for t, g in enumerate(gradients, 1):
        optimizer.update(ours, g, RATE, t)
        m = f(0.9) * m + (f(1) - f(0.9)) * g
        v = f(0.999) * v + (f(1) - f(0.999)) * (g * g)
        c1, c2 = f(1 / (1 - 0.9**t)), f(1 / (1 - 0.999**t))
        expected = expected - f(RATE) * c1 * (m / (np.sqrt(v * c2) + f(1e-8)))
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("adamw", lambda: mlx.optimizers.AdamW(RATE, bias_correction=True, weight_decay=0)),
        ("lion", lambda: mlx.optimizers.Lion(RATE, betas=[0.9, 0.99], weight_decay=0)),
        ("sgd", lambda: mlx.optimizers.SGD(RATE, momentum=0)),
        (
            "adafactor",
            lambda: mlx.optimizers.Adafactor(
                RATE, relative_step=False, scale_parameter=False, weight_decay=0
            ),
        ),
    ],
)
def test_the_same_as_mlx(name, theirs):
    optimizer = theirs()
    start, gradients = draws(12)
    tree = {n: mx.array(v) for n, v in LAYOUT.views(start).items()}
    for gradient in gradients:
        slopes = {n: mx.array(v) for n, v in LAYOUT.views(gradient).items()}
        tree = optimizer.apply_gradients(slopes, tree)
        mx.eval(tree, optimizer.state)
    expected = np.concatenate([np.array(value).reshape(-1) for value in tree.values()])
    np.testing.assert_allclose(run(name), expected, rtol=2e-5, atol=2e-6)


def test_lion_moves_every_entry_by_the_learning_rate_after_decay():
    def update(state, name, p, g, step):
        m = state.get("m", 0)
        state["m"] = 0.99 * m + 0.01 * g
        decay = DECAY if p.ndim > 1 else 0.0
        return p * (1 - RATE * decay) - RATE * np.sign(0.9 * m + 0.1 * g)

    np.testing.assert_allclose(run("lion", weight_decay=DECAY), by_name(update), rtol=2e-5)


def test_sgd_with_momentum_and_decay():
    def update(state, name, p, g, step):
        state["m"] = 0.7 * state.get("m", 0) + g
        decay = DECAY if p.ndim > 1 else 0.0
        return p * (1 - RATE * decay) - RATE * state["m"]

    ours = run("sgd", weight_decay=DECAY, beta1=0.7)
    np.testing.assert_allclose(ours, by_name(update), rtol=2e-5, atol=1e-7)


def test_lora_plus_multiplies_the_rate_of_b_alone():
    plain, faster = run("sgd"), run("sgd", lora_plus=16.0)
    start, _ = draws(1)
    moved, further = (LAYOUT.views(end - start) for end in (plain, faster))
    for name in LAYOUT.shapes:
        ratio = 16.0 if name.endswith(".b") else 1.0
        np.testing.assert_allclose(further[name], ratio * moved[name], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_state_goes_on_to_the_bit(name):
    settings = {"beta1": 0.5} if name in ("sgd", "adafactor") else {}
    whole = make_optimizer(name, LAYOUT, weight_decay=DECAY, **settings)
    before, gradients = draws(6)
    after = before.copy()
    for step, gradient in enumerate(gradients[:3], 1):
        whole.update(before, gradient, RATE, step)
        after[:] = before
    other = make_optimizer(name, LAYOUT, weight_decay=DECAY, **settings)
    other.load_state({key: array.copy() for key, array in whole.state().items()})
    for step, gradient in enumerate(gradients[3:], 4):
        whole.update(before, gradient, RATE, step)
        other.update(after, gradient, RATE, step)
    assert np.array_equal(before, after)
    for key, array in whole.state().items():
        assert np.array_equal(array, other.state()[key]), key


def test_the_state_of_another_optimizer_is_refused():
    adamw, lion = make_optimizer("adamw", LAYOUT), make_optimizer("lion", LAYOUT)
    with pytest.raises(CheckpointError, match="holds m where m, v is needed"):
        adamw.load_state(lion.state())
    with pytest.raises(CheckpointError, match=r"the optimizer's m is float32 \[3\]"):
        lion.load_state({"m": np.zeros(3, np.float32)})


def test_8_bits_hold_the_state_in_a_quarter():
    full, small = (
        sum(array.nbytes for array in make_optimizer(name, wide()).state().values())
        for name in ("adamw", "adamw-8bit")
    )
    assert small < 0.26 * full


def wide() -> Layout:
    return Layout({"embed.weight": (100, 512)}, {})


@given(st.integers(0, 2**32 - 1), st.floats(-6, 6), st.sampled_from(["signed", "unsigned"]))
def test_8_bit_codes_are_as_near_as_their_steps(seed, size, kind):
    """k decades below the block's largest, a step is the decade's nine tenths over 2^(6 - k), or
    over 2^(7 - k) without a sign; the error is half of it at most."""
    rng = np.random.default_rng(seed)
    x = 10.0 ** (rng.uniform(-8, 0, (3, BLOCK)) + size)
    if kind == "signed":
        x *= rng.choice([-1, 1], x.shape)
    x = x.astype(np.float32)
    code, bits = (SIGNED, 6) if kind == "signed" else (UNSIGNED, 7)
    codes, scale = code.encode(x)
    back = code.values[codes] * scale[:, None]
    share = np.abs(x) / np.abs(x).max(axis=1, keepdims=True)
    decade = np.minimum(np.floor(-np.log10(share)), 6)
    step = 0.9 * 10.0**-decade / 2.0 ** (bits - decade)
    error = np.abs(back - x) / np.abs(x).max(axis=1, keepdims=True)
    assert (error <= np.maximum(step / 2, 1e-6) * 1.001).all()
    assert (back * x >= 0).all()
    shares = x / np.abs(x).max(axis=1, keepdims=True)
    plain = np.searchsorted(code.edges, shares)
    dropped = (kind == "unsigned") & (plain == code.zero)  # but for those kept from zero
    assert np.array_equal(codes[~dropped], plain[~dropped])
    if kind == "unsigned":
        assert (back > 0).all(), "a square that is not zero stays above zero"


def test_8_bit_adamw_learns_as_adamw_does():
    """Least squares with noisy gradients: both come as near to the solution."""
    ends = {}
    for name in ("adamw", "adamw-8bit"):
        rng = np.random.default_rng(2)
        target = rng.normal(size=LAYOUT.size).astype(np.float32)
        parameters = np.zeros(LAYOUT.size, np.float32)
        optimizer = make_optimizer(name, LAYOUT)
        for step in range(1, 401):
            noise = rng.normal(size=LAYOUT.size).astype(np.float32)
            optimizer.update(parameters, parameters - target + 0.3 * noise, 2e-2, step)
        ends[name] = float(np.abs(parameters - target).mean())
    assert ends["adamw"] < 0.06
    assert ends["adamw-8bit"] < 1.1 * ends["adamw"]


def test_8_bit_codes_at_their_edges():
    """On an edge, one float below it and one above."""
    for code in (SIGNED, UNSIGNED):
        near = [code.edges, np.nextafter(code.edges, -2), np.nextafter(code.edges, 2)]
        for row in near:
            x = np.append(row, 1).astype(np.float32)[None]  # its largest is 1
            codes, _ = code.encode(x)
            plain = np.searchsorted(code.edges, x)
            kept = (plain == code.zero) & (x != 0) & (code is UNSIGNED)
            assert np.array_equal(codes, np.where(kept, code.zero + 1, plain))


def test_8_bit_state_of_zeros_is_exactly_zero():
    codes, scale = SIGNED.encode(np.zeros((2, BLOCK), np.float32))
    assert not (SIGNED.values[codes] * scale[:, None]).any()
    optimizer = make_optimizer("adamw-8bit", LAYOUT)
    parameters = np.ones(LAYOUT.size, np.float32)
    optimizer.update(parameters, np.zeros(LAYOUT.size, np.float32), RATE, 1)
    assert (parameters == 1).all()


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 10))
def test_clipping_scales_to_the_limit_and_no_further(seed, limit):
    gradient = np.random.default_rng(seed).normal(size=1000).astype(np.float32)
    exact = float(np.sqrt((gradient.astype(np.float64) ** 2).sum()))
    cut = gradient.copy()
    assert clip(cut, limit * exact) == pytest.approx(exact, rel=1e-12)
    np.testing.assert_allclose(cut, gradient * min(1.0, limit), rtol=1e-6)
    assert clip(gradient.copy(), 0) == pytest.approx(exact, rel=1e-12)


def test_clipping_leaves_what_is_not_finite_to_the_caller():
    gradient = np.array([1, np.inf], np.float32)
    assert clip(gradient, 1.0) == np.inf
    assert gradient.tolist() == [1, np.inf]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("adam", {}, "no optimizer 'adam'"),
        ("lion", {"eps": 1e-8}, "no setting 'eps'"),
        ("adamw", {"beta1": 1.0}, "beta1 must be"),
        ("adamw", {"eps": 0.0}, "eps must be"),
        ("sgd", {"weight_decay": -1.0}, "weight decay must be"),
    ],
)
def test_nonsense_is_refused_by_name(name, settings, words):
    with pytest.raises(InvalidRequest, match=words):
        make_optimizer(name, LAYOUT, **settings)
