"""New models from a config: as wide as they should be, the same from a seed, and they learn."""

from __future__ import annotations

import json

import numpy as np
import pytest

from localllm.errors import InvalidRequest, UnsupportedModel
from localllm.train.layout import initial, layout_for
from localllm.train.lora import FullConfig
from localllm.train.methods import make_method
from localllm.train.optimizers import clip, make_optimizer
from localllm.train.programs import open_program
from localllm.train.scratch import normal, scratch_weights
from tests.models.running import golden, golden_names
from tests.train.cases import Side

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def test_matrices_are_normal_and_narrower_where_they_add_to_the_residual_stream():
    base = scratch_weights({**CONFIG, "hidden_size": 256, "initializer_range": 0.05})
    found = {name: tensor.to_float32() for name, tensor in base.tensors()}
    assert found["layers.0.attn.q.weight"].std() == pytest.approx(0.05, rel=0.02)
    assert found["layers.1.ffn.down.weight"].std() == pytest.approx(0.025, rel=0.02)
    assert found["embed.weight"].mean() == pytest.approx(0, abs=2e-3)
    assert (found["final_norm.weight"] == 1).all()


def test_drawn_numbers_are_standard_normal():
    drawn = normal(3, "x", 200_001)
    assert len(drawn) == 200_001
    assert drawn.mean() == pytest.approx(0, abs=0.01)
    assert drawn.std() == pytest.approx(1, abs=0.01)
    assert (np.abs(drawn) < 1.959964).mean() == pytest.approx(0.95, abs=0.003)
    assert (np.abs(drawn) < 0.674490).mean() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("name", [name for name in golden_names() if "gguf" not in name])
def test_every_architecture_can_begin_anew(name):
    """Gains are 1 whatever the norm adds to its weight, so activations neither vanish nor burst."""
    base = scratch_weights(golden(name).config)
    for key, tensor in base.tensors():
        value = tensor.to_float32()
        assert np.isfinite(value).all()
        if key.startswith("final_norm.weight"):
            assert (value + base.spec.final_norm.offset == 1).all()


def test_the_same_seed_gives_the_same_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    one, two, other = (scratch_weights(tmp_path, seed=seed) for seed in (1, 1, 2))
    for (name, a), (_, b), (_, c) in zip(
        one.tensors(), two.tensors(), other.tensors(), strict=True
    ):
        assert np.array_equal(a.to_float32(), b.to_float32()), name
        if a.to_float32().ndim > 1:
            assert not np.array_equal(a.to_float32(), c.to_float32()), name


def test_a_tokenizer_may_bring_its_own_vocabulary():
    base = scratch_weights(CONFIG, vocab_size=300)
    assert base.spec.vocab_size == 300
    assert dict(base.tensors())["embed.weight"].shape == (300, 48)


def test_a_new_model_learns_a_text_by_heart():
    """Pre-training is the same loop: from chance to near certainty."""
    base = scratch_weights(CONFIG)
    config = FullConfig()
    layout = layout_for(base.spec, config)
    program, _ = open_program(base, layout, config)
    method, optimizer = make_method("sft"), make_optimizer("adamw", layout)
    tokens = np.random.default_rng(0).integers(0, 61, (4, 24)).astype(np.int32)
    trained = np.arange(24) > 0
    items = [Side(row, trained) for row in tokens]
    parameters, losses = initial(layout, 0, base), []
    for step in range(1, 61):
        batch = method.step_rows(items)
        weights = method.weights(batch, method.count(items)).weights
        gradient = np.zeros(layout.size, np.float32)
        losses.append(program.gradients(batch.rows, weights, parameters, gradient))
        clip(gradient, 1.0)
        optimizer.update(parameters, gradient, 3e-3, step)
    assert losses[0] == pytest.approx(np.log(61), rel=0.03)
    assert losses[-1] < 0.3


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("{", InvalidRequest, "is no JSON"),
        ("[]", InvalidRequest, "holds no object"),
        ('{"model_type": "rwkv"}', UnsupportedModel, "rwkv"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, content, error, words):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(error, match=words):
        scratch_weights(path)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match=r"none\.json cannot be read"):
        scratch_weights(tmp_path / "none.json")
