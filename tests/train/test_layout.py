"""Layouts: which linears a name means, their ranks and scales, and what training starts from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from localllm.errors import InvalidRequest
from localllm.train.base import weights_in_memory
from localllm.train.layout import initial, layout_for
from localllm.train.lora import FullConfig, LoRAConfig
from tests.backend.random_models import linears_of, llama, random_weights, specs
from tests.backend.test_experts import mixture

SPEC = llama()
# Experts in all layers but the first.
MIXTURE = replace(mixture(), architecture="qwen3_moe")
LINEARS_OF_QWEN3 = [target.split(".", 2)[2] for target in linears_of(MIXTURE)]


@given(specs())
def test_all_linear_is_every_linear_of_any_decoder(spec):
    linears = linears_of(spec)
    layout = layout_for(spec, LoRAConfig(dora=True))
    assert sorted(layout.targets) == sorted(linears)
    assert {name.rpartition(".")[0] for name in layout.shapes} == set(linears)


@pytest.mark.parametrize(
    ("targets", "stems", "layers"),
    [
        ("q_proj", ["attn.q"], [0, 1]),
        (("attn.q", "down"), ["attn.q", "ffn.down"], [0, 1]),
        (("layers.1.attn.v",), ["attn.v"], [1]),
        (("layers.0.mlp.up_proj", "o"), ["attn.o", "ffn.up"], [0, 1]),
    ],
)
def test_names_are_ours_or_the_checkpoints_and_match_by_their_ends(targets, stems, layers):
    found = layout_for(SPEC, LoRAConfig(targets=targets)).targets
    assert {target.split(".", 2)[2] for target in found} == set(stems)
    assert {int(target.split(".")[1]) for target in found} == set(layers)


@pytest.mark.parametrize(
    ("targets", "stems"),
    [
        ("experts.gate_up_proj", ["moe.gate", "moe.up"]),
        (("mlp.experts.down_proj",), ["moe.down"]),
        ("moe.up", ["moe.up"]),
        (("q_proj", "moe.down"), ["attn.q", "moe.down"]),
        ("down_proj", ["ffn.down"]),
        (("all-linear", "layers.1.moe.up"), [*LINEARS_OF_QWEN3, "moe.up"]),
    ],
)
def test_experts_are_named_beside_the_linears(targets, stems):
    layout = layout_for(MIXTURE, LoRAConfig(rank=2, targets=targets))
    assert {target.split(".", 2)[2] for target in layout.targets} == set(stems)
    if "moe.up" in stems:
        assert layout.shapes["layers.1.moe.up.a"] == (7, 2, 64)
        assert layout.shapes["layers.1.moe.up.b"] == (7, 64, 2)


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"dora": True}])
def test_experts_take_neither_dropout_nor_dora(settings):
    with pytest.raises(InvalidRequest, match=r"layers\.1\.moe\.up: .*neither dropout nor DoRA"):
        layout_for(MIXTURE, LoRAConfig(targets="moe.up", **settings))


def test_ranks_and_scales_are_those_of_the_first_pattern_that_matches():
    config = LoRAConfig(
        rank=8,
        alpha=16.0,
        targets=("q_proj", "down_proj"),
        rank_pattern={"layers.0.attn.q": 2, "q_proj": 4},
        alpha_pattern={"down_proj": 4.0},
    )
    layout = layout_for(SPEC, config)
    assert layout.shapes["layers.0.attn.q.a"] == (2, 64)
    assert layout.shapes["layers.1.attn.q.b"] == (64, 4)
    assert layout.scales == {
        "layers.0.attn.q": 8.0,
        "layers.0.ffn.down": 0.5,
        "layers.1.attn.q": 4.0,
        "layers.1.ffn.down": 0.5,
    }
    stabilized = layout_for(SPEC, LoRAConfig(rank=16, alpha=8.0, rslora=True))
    assert set(stabilized.scales.values()) == {2.0}


def test_unknown_names_are_told_with_those_there_are():
    with pytest.raises(InvalidRequest, match="'w_qkv'") as caught:
        layout_for(SPEC, LoRAConfig(targets=("q_proj", "w_qkv")))
    assert "attn.q, attn.k" in (caught.value.hint or "")
    with pytest.raises(InvalidRequest, match="'up_proj'"):
        layout_for(SPEC, LoRAConfig(targets="q_proj", rank_pattern={"up_proj": 2}))


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"rank": 5000},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"lora_plus": 0.0},
        {"targets": ()},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidRequest):
        LoRAConfig(**settings)


def test_adapters_start_as_peft_has_them():
    """A uniform within 1 / sqrt(in) (Kaiming with sqrt 5), B zero, magnitudes the rows' lengths."""
    weights = random_weights(SPEC)
    layout = layout_for(SPEC, LoRAConfig(rank=32, dora=True))
    views = layout.views(initial(layout, 3, weights_in_memory(SPEC, weights)))
    for name, view in views.items():
        if name.endswith(".a"):
            bound = view.shape[1] ** -0.5
            assert np.abs(view).max() <= bound
            assert view.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        elif name.endswith(".b"):
            assert not view.any()
        else:
            weight = weights[name.replace("magnitude", "weight")].astype(np.float64)
            np.testing.assert_allclose(view, np.linalg.norm(weight, axis=1), rtol=1e-6)


def test_a_start_depends_on_seed_and_name_alone():
    layout = layout_for(SPEC, LoRAConfig())
    few = layout_for(SPEC, LoRAConfig(targets="down_proj"))
    assert np.array_equal(initial(layout, 1), initial(layout, 1))
    assert not np.array_equal(initial(layout, 1), initial(layout, 2))
    name = "layers.1.ffn.down.a"
    assert np.array_equal(layout.views(initial(layout, 1))[name], few.views(initial(few, 1))[name])


def test_full_training_starts_from_the_weights():
    weights = random_weights(SPEC)
    layout = layout_for(SPEC, FullConfig())
    start = layout.views(initial(layout, 0, weights_in_memory(SPEC, weights)))
    assert all(np.array_equal(start[name], weights[name]) for name in weights)
