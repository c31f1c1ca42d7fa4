"""The reference program: gradients against finite differences in float64, and its promises."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.errors import BackendUnavailable, CheckpointError, InvalidRequest
from localllm.spec import DecoderSpec, MoESpec
from localllm.spec.weights import weight_shapes
from localllm.train.base import BaseWeights, weights_in_memory
from localllm.train.layout import initial, layout_for
from localllm.train.lora import FullConfig, LoRAConfig, TuneConfig
from localllm.train.program import Layout, Noise, Rows
from localllm.train.programs import open_program
from localllm.train.reference import ReferenceProgram
from tests.backend import oracle
from tests.backend.random_models import (
    PACKINGS,
    hybrid,
    linears_of,
    llama,
    random_weights,
    specs,
    unpacked,
)
from tests.examples import examples

Arrays = dict[str, np.ndarray]


def rows_of(spec: DecoderSpec, sizes: list[int], seed: int = 0, first_row: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, spec.vocab_size, (2, sum(sizes))).astype(np.int32)
    return Rows(tokens, targets, np.cumsum([0, *sizes]).astype(np.int32), first_row)


def cut(rows: Rows, first: int, last: int) -> Rows:
    """Some of its sequences, as a micro-batch of the same step."""
    begin, end = int(rows.offsets[first]), int(rows.offsets[last])
    return Rows(
        rows.tokens[begin:end],
        rows.targets[begin:end],
        rows.offsets[first : last + 1] - begin,
        rows.first_row + begin,
    )


def some_weights(count: int, seed: int = 0) -> np.ndarray:
    """A third of them zero."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=count) * (rng.random(count) < 0.67)).astype(np.float32)


def under_way(layout: Layout, base: BaseWeights, seed: int = 1) -> np.ndarray:
    """Parameters as some steps would leave them: B is not zero, gains are not 1."""
    flat = initial(layout, seed, base)
    rng = np.random.default_rng(seed)
    for name, view in layout.views(flat).items():
        if name.endswith(".magnitude"):
            view *= rng.uniform(0.7, 1.4, view.shape).astype(np.float32)
        else:
            view += (0.15 / np.sqrt(view.shape[-1]) * rng.normal(size=view.shape)).astype("f4")
    return flat


def merged(
    weights: Arrays, layout: Layout, parameters: np.ndarray, lengths: Arrays | None = None
) -> Arrays:
    """The weights that a set of parameters stands for, in float64.

    lengths: of DoRA's rows, where they are to stay what they were at another point.
    """
    values = {n: v.astype(np.float64) for n, v in layout.views(parameters).items()}
    if not layout.scales:
        return values
    result = {name: value.astype(np.float64) for name, value in weights.items()}
    for target, scale in layout.scales.items():
        whole = result[f"{target}.weight"] + scale * values[f"{target}.b"] @ values[f"{target}.a"]
        if f"{target}.magnitude" in values:
            own = np.linalg.norm(whole, axis=1) if lengths is None else lengths[target]
            whole = whole * (values[f"{target}.magnitude"] / own)[:, None]
        result[f"{target}.weight"] = whole
    return result


def oracle_log_probs(spec: DecoderSpec, weights: Arrays, rows: Rows) -> np.ndarray:
    parts = []
    for begin, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        # RoPE that depends on the length takes the whole sequence's.
        logits = oracle.logits(spec, weights, rows.tokens[begin:end], int(end - begin))
        logits = logits - logits.max(axis=-1, keepdims=True)
        total = np.log(np.exp(logits).sum(axis=-1))
        parts.append(logits[np.arange(end - begin), rows.targets[begin:end]] - total)
    return np.concatenate(parts)


def check_gradient(spec: DecoderSpec, weights: Arrays, config: TuneConfig, sizes: list[int]):
    """Loss and directional derivatives against float64, one random direction a parameter."""
    base = weights_in_memory(spec, weights)
    layout = layout_for(spec, config)
    program = ReferenceProgram(base, layout)
    parameters, rows = under_way(layout, base), rows_of(spec, sizes)
    row_weights = some_weights(sum(sizes))
    lengths = {
        target: np.linalg.norm(
            weights[f"{target}.weight"].astype(np.float64)
            + scale
            * layout.views(parameters)[f"{target}.b"].astype(np.float64)
            @ layout.views(parameters)[f"{target}.a"],
            axis=1,
        )
        for target, scale in layout.scales.items()
    }

    def loss(at: np.ndarray) -> float:
        stood_for = merged(weights, layout, at, lengths)
        return -float(row_weights @ oracle_log_probs(spec, stood_for, rows))

    gradient = np.zeros(layout.size, np.float32)
    found = program.gradients(rows, row_weights, parameters, gradient)
    exact = parameters.astype(np.float64)
    assert found == pytest.approx(loss(exact), rel=2e-4, abs=2e-4)
    rng = np.random.default_rng(3)
    at = 0
    largest = float(np.abs(gradient).max())
    for name, shape in layout.shapes.items():
        place = slice(at, at + int(np.prod(shape)))
        at = place.stop
        if name.endswith(".scalar.weight"):  # training keeps it, as transformers does
            assert not gradient[place].any()
            continue
        direction = np.zeros(layout.size)
        direction[place] = rng.normal(size=place.stop - place.start)
        direction /= np.linalg.norm(direction)
        step = 1e-5
        slope = (loss(exact + step * direction) - loss(exact - step * direction)) / (2 * step)
        ours = float(gradient[place].astype(np.float64) @ direction[place])
        size = float(np.linalg.norm(gradient[place].astype(np.float64)))
        assert ours == pytest.approx(slope, rel=2e-3, abs=2e-3 * size + 2e-5 * largest), name


@pytest.mark.parametrize("config", [LoRAConfig(rank=2), FullConfig()], ids=["lora", "full"])
def test_recurrent_layers_have_the_gradients_of_finite_differences(config):
    spec = hybrid(hidden=16)
    check_gradient(spec, random_weights(spec), config, [5, 1, 7])


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=3, targets=("q", "ffn.down"), rank_pattern={"down": 5}),
        LoRAConfig(rank=2, dora=True, rslora=True),
        FullConfig(),
    ],
    ids=["lora", "dora", "full"],
)
def test_gradients_are_those_of_finite_differences(config):
    spec = llama(hidden=16, layers=2)
    check_gradient(spec, random_weights(spec), config, [5, 1, 9])


@pytest.mark.parametrize("shape", ["softmax", "own norms", "dense beside"])
def test_gradients_of_experts_are_those_of_finite_differences(shape):
    """Some experts see no row, and their pairs get no gradient."""
    base = llama(hidden=16, layers=2)
    moe = MoESpec(experts=5, top_k=2, hidden=8, bias=True, own_norms=shape == "own norms")
    layers = [replace(layer, ffn=moe) for layer in base.layers]
    if shape == "dense beside":
        layers[0] = base.layers[0]
    spec = replace(base, layers=tuple(layers))
    targets = ("all-linear", "moe.gate", "moe.up", "moe.down")
    config = LoRAConfig(rank=2, targets=targets, rank_pattern={"moe.down": 3})
    check_gradient(spec, random_weights(spec), config, [5, 1, 9])


@settings(max_examples=examples(12))
@given(specs(), st.sampled_from(["lora", "dora", "full"]), st.integers(0, 100))
def test_gradients_of_any_decoder(spec, kind, seed):
    """Every activation that has a corner is smoothed over, where finite differences fail."""
    spec = _smooth(spec)
    if kind != "full" and not linears_of(spec):
        return
    config = FullConfig() if kind == "full" else LoRAConfig(rank=2, dora=kind == "dora")
    check_gradient(spec, random_weights(spec, seed), config, [6, 3])


def _smooth(spec: DecoderSpec) -> DecoderSpec:
    layers = []
    for layer in spec.layers:
        ffn = layer.ffn
        if ffn.activation in ("relu", "clamped_swiglu"):
            ffn = replace(ffn, activation="silu")
        layers.append(replace(layer, ffn=ffn))
    return replace(spec, layers=tuple(layers))


@given(specs(), st.integers(0, 100))
@settings(max_examples=examples(15))
def test_a_sequence_in_a_batch_is_as_if_alone(spec, seed):
    weights = random_weights(spec, seed)
    base = weights_in_memory(spec, weights)
    layout = Layout({}, {})
    program = ReferenceProgram(base, layout)
    rows = rows_of(spec, [7, 1, 12, 3], seed)
    together = program.log_probs(rows, None)
    alone = [program.log_probs(cut(rows, n, n + 1), None) for n in range(4)]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(together, oracle_log_probs(spec, weights, rows), atol=2e-3)


def test_what_one_sequence_holds_never_reaches_another():
    """To the bit: the other's tokens change, and so do shapes of nothing."""
    spec = llama()
    program = ReferenceProgram(weights_in_memory(spec, random_weights(spec)), Layout({}, {}))
    rows = rows_of(spec, [9, 14])
    other = replace(rows, tokens=rows.tokens.copy())
    other.tokens[:9] = (other.tokens[:9] + 1) % spec.vocab_size
    before, after = program.log_probs(rows, None), program.log_probs(other, None)
    assert np.array_equal(before[9:], after[9:])
    assert not np.array_equal(before[:9], after[:9])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_may_be_cut_anywhere(dropout):
    """Micro-batches add up to the step's gradient, dropout and NEFTune included."""
    spec = llama(hidden=32)
    base = weights_in_memory(spec, random_weights(spec))
    layout = layout_for(spec, LoRAConfig(rank=4))
    program = ReferenceProgram(base, layout)
    parameters = under_way(layout, base)
    rows = rows_of(spec, [6, 11, 2, 9], first_row=1000)
    weights = some_weights(28)
    noise = Noise(seed=2**40 + 5, dropout=dropout, neftune=5.0 if dropout else 0.0)
    sums, losses = [], []
    for edges in ([0, 4], [0, 1, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]):
        gradient, loss = np.zeros(layout.size, np.float32), 0.0
        for first, last in pairwise(edges):
            part = cut(rows, first, last)
            here = part.first_row - rows.first_row
            own = weights[here : here + len(part.tokens)]
            loss += program.gradients(part, own, parameters, gradient, noise)
        sums.append(gradient)
        losses.append(loss)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    for other in sums[1:]:
        np.testing.assert_allclose(other, sums[0], atol=2e-5 * np.abs(sums[0]).max())
    if dropout:
        plain = np.zeros(layout.size, np.float32)
        program.gradients(rows, weights, parameters, plain)
        assert np.abs(plain - sums[0]).max() > 0.05 * np.abs(plain).max()


def test_the_same_step_gives_the_same_bits():
    spec = llama()
    base = weights_in_memory(spec, random_weights(spec))
    layout = layout_for(spec, LoRAConfig())
    rows, weights = rows_of(spec, [20, 30]), some_weights(50)
    found = []
    for _ in range(2):
        program = ReferenceProgram(base, layout)
        gradient = np.zeros(layout.size, np.float32)
        loss = program.gradients(
            rows, weights, under_way(layout, base), gradient, Noise(7, dropout=0.1)
        )
        found.append((loss, gradient))
        program.close()
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dora", [False, True])
def test_an_untrained_adapter_is_the_base_to_the_bit(dora):
    spec = llama()
    base = weights_in_memory(spec, random_weights(spec))
    layout = layout_for(spec, LoRAConfig(dora=dora))
    program = ReferenceProgram(base, layout)
    rows = rows_of(spec, [20, 30])
    with_adapter = program.log_probs(rows, initial(layout, 0, base), Noise(1, dropout=0.5))
    assert np.array_equal(with_adapter, program.log_probs(rows, None))


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.of)
def test_quantized_bases_are_trained_as_the_weights_that_they_stand_for(packing):
    """QLoRA: the adapter's gradient over codes is that over the dense weights."""
    spec = llama(hidden=256, layers=1)
    weights = random_weights(spec)
    rng = np.random.default_rng(0)
    codes = {
        name: packing.random(rng, weights[name].shape)
        for name in weights
        if weights[name].ndim == 2 and name != "embed.weight"
    }
    dense = {**weights, **{name: unpacked(t).astype(np.float32) for name, t in codes.items()}}
    layout = layout_for(spec, LoRAConfig(rank=2, targets=("attn.q", "ffn.down")))
    rows, row_weights = rows_of(spec, [30]), some_weights(30)
    found = []
    for held in ({**weights, **codes}, dense):
        base = weights_in_memory(spec, held)
        gradient = np.zeros(layout.size, np.float32)
        program = ReferenceProgram(base, layout)
        program.gradients(rows, row_weights, under_way(layout, base), gradient)
        found.append(gradient)
    np.testing.assert_allclose(found[0], found[1], atol=3e-4 * np.abs(found[1]).max())


def test_full_training_of_a_quantized_model_is_refused_unless_asked_for():
    spec = llama(hidden=256, layers=1)
    weights = random_weights(spec)
    packing = PACKINGS[0]
    codes = packing.random(np.random.default_rng(0), weights["layers.0.ffn.up.weight"].shape)
    base = weights_in_memory(spec, {**weights, "layers.0.ffn.up.weight": codes})
    layout = layout_for(spec, FullConfig())
    with pytest.raises(InvalidRequest, match="keeps 1 weights in few bits") as caught:
        open_program(base, layout, FullConfig(), program="reference")
    assert "--dequantize" in (caught.value.hint or "")
    program, _ = open_program(base, layout, FullConfig(dequantize=True), program="reference")
    start = layout.views(initial(layout, 0, base))["layers.0.ffn.up.weight"]
    np.testing.assert_allclose(start, unpacked(codes), rtol=1e-6, atol=1e-7)
    program.close()


def test_rows_of_weight_zero_cost_nothing_and_change_nothing():
    spec = llama()
    base = weights_in_memory(spec, random_weights(spec))
    layout = layout_for(spec, LoRAConfig())
    program = ReferenceProgram(base, layout)
    rows, weights = rows_of(spec, [12]), np.zeros(12, np.float32)
    gradient = np.ones(layout.size, np.float32)
    parameters = under_way(layout, base)
    assert program.gradients(rows, weights, parameters, gradient) == 0.0
    assert (gradient == 1).all()
    weights[3] = 0.5  # what follows row 3 cannot matter, nor can targets elsewhere
    other = replace(rows, targets=np.where(np.arange(12) == 3, rows.targets, 0).astype(np.int32))
    found = []
    for given_rows in (rows, other):
        gradient = np.zeros(layout.size, np.float32)
        program.gradients(given_rows, weights, parameters, gradient)
        found.append(gradient)
    assert np.array_equal(*found)
    assert found[0].any()


def test_logits_come_in_chunks_that_change_nothing(monkeypatch):
    from localllm.train import reference_head

    spec = llama()
    base = weights_in_memory(spec, random_weights(spec))
    layout = layout_for(spec, FullConfig())
    rows, weights = rows_of(spec, [40, 25]), some_weights(65)
    found = []
    for limit in (1 << 23, 96 * 20):
        monkeypatch.setattr(reference_head, "_LOGITS", limit)
        program = ReferenceProgram(base, layout)
        gradient = np.zeros(layout.size, np.float32)
        parameters = initial(layout, 0, base)
        loss = program.gradients(rows, weights, parameters, gradient)
        found.append((loss, gradient, program.log_probs(rows, parameters)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-5)
    np.testing.assert_allclose(found[1][2], found[0][2], rtol=1e-5, atol=1e-5)


def test_long_sequences_attend_over_all_their_chunks():
    """300 rows are more than attention takes at a time; a window reaches over the seam."""
    for window in (None, 70):
        spec = replace(llama(hidden=32, layers=1, window=window), context=400)
        weights = random_weights(spec)
        program = ReferenceProgram(weights_in_memory(spec, weights), Layout({}, {}))
        rows = rows_of(spec, [300, 5])
        np.testing.assert_allclose(
            program.log_probs(rows, None), oracle_log_probs(spec, weights, rows), atol=1e-3
        )


@pytest.mark.parametrize(
    ("sizes", "change", "words"),
    [
        ([65], lambda r: r, "a sequence of 65 tokens; the model takes 64"),
        ([3], lambda r: replace(r, tokens=r.tokens + 96), "token ids"),
        ([3], lambda r: replace(r, targets=r.targets - 97), "target ids"),
    ],
)
def test_what_the_model_cannot_take_is_named(sizes, change, words):
    spec = llama()
    program = ReferenceProgram(weights_in_memory(spec, random_weights(spec)), Layout({}, {}))
    with pytest.raises(InvalidRequest, match=words):
        program.log_probs(change(rows_of(spec, sizes)), None)


def test_a_missing_weight_is_named():
    spec = llama()
    weights = random_weights(spec)
    del weights["layers.1.ffn.up.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.up\.weight"):
        ReferenceProgram(weights_in_memory(spec, weights), Layout({}, {}))


def test_the_choice_of_a_program_is_told(monkeypatch):
    from localllm.train import programs

    spec = llama()
    base = weights_in_memory(spec, random_weights(spec))
    config = LoRAConfig()
    layout = layout_for(spec, config)
    monkeypatch.setattr(programs, "_native", lambda: (None, "it is not built here"))
    program, note = open_program(base, layout, config, threads=3)
    assert program.name == "reference"
    assert "not the native one: it is not built here" in (note or "")
    assert "not 3" in (note or "")
    with pytest.raises(BackendUnavailable, match="it is not built here"):
        open_program(base, layout, config, program="native")
    assert open_program(base, layout, config, program="reference")[1] is None


def test_full_layouts_hold_exactly_the_weights():
    spec = llama()
    assert layout_for(spec, FullConfig()).shapes == weight_shapes(spec)
