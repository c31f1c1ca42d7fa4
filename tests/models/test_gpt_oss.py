"""gpt-oss as it is published: experts in blocks of MXFP4."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from localllm.checkpoint.opening import open_checkpoint
from localllm.errors import CheckpointError, UnsupportedModel
from localllm.models import load_forms, load_spec, load_weights
from tests.models.running import backend, difference, golden, whole_prompt
from tests.models.tiny import random_tensors

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
INNER = 64
CASE = golden("gpt_oss-top2-yarn")
CONFIG = {**CASE.config, "intermediate_size": INNER}
EXPERTS = CONFIG["num_local_experts"]
PUBLISHED = {
    **CONFIG,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}


def tensors() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same model twice: with dense experts, and with their blocks."""
    rng = np.random.default_rng(4)
    hidden = CONFIG["hidden_size"]
    others = {name: shape for name, shape in CASE.shapes.items() if ".experts." not in name}
    dense = random_tensors(others)
    blocks = dict(dense)
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}.mlp.experts."
        for name, out, inner in (
            ("gate_up_proj", 2 * INNER, hidden),
            ("down_proj", hidden, INNER),
        ):
            raw = rng.integers(0, 256, (EXPERTS, out, inner // 32, 16), dtype=np.uint8)
            scales = rng.integers(120, 126, (EXPERTS, out, inner // 32), dtype=np.uint8)
            nibbles = np.stack((raw & 15, raw >> 4), -1).reshape(EXPERTS, out, inner // 32, 32)
            weights = np.array(VALUES, np.float32)[nibbles]
            weights = weights * 2.0 ** (scales.astype(np.float32)[..., None] - 127)
            bias = rng.standard_normal((EXPERTS, out)).astype(np.float32)
            dense[at + name] = np.ascontiguousarray(
                weights.reshape(EXPERTS, out, inner).swapaxes(1, 2).astype(np.float32)
            )
            blocks[at + name + "_blocks"], blocks[at + name + "_scales"] = raw, scales
            dense[at + name + "_bias"] = blocks[at + name + "_bias"] = bias
    return dense, blocks


def folder(path: Path, config: dict, parts: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(parts, path / "model.safetensors")
    return path


def test_blocks_of_mxfp4_compute_what_the_dense_weights_do(tmp_path: Path) -> None:
    dense, blocks = tensors()
    whole = backend(folder(tmp_path / "dense", CONFIG, dense), len(CASE.tokens))
    packed = backend(folder(tmp_path / "mxfp4", PUBLISHED, blocks), len(CASE.tokens))
    wanted = whole_prompt(whole, CASE.tokens)
    assert difference(whole_prompt(packed, CASE.tokens), wanted) < 1e-5


def test_sizes_are_told_from_headers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder(tmp_path / "mxfp4", PUBLISHED, tensors()[1]))
    spec = load_spec(checkpoint)
    forms = load_forms(checkpoint, spec)
    weights = dict(load_weights(checkpoint, spec))
    assert forms["layers.0.moe.gate.weight"].row_bytes(32) == 32 * 5 // 8 + 2
    assert weights["layers.1.moe.down.weight"].shape == (EXPERTS, CONFIG["hidden_size"], INNER)
    assert weights["layers.1.moe.down.bias"].shape == (EXPERTS * CONFIG["hidden_size"],)


def test_blocks_without_their_scales_are_missing(tmp_path: Path) -> None:
    blocks = tensors()[1]
    del blocks["model.layers.1.mlp.experts.down_proj_scales"]
    checkpoint = open_checkpoint(folder(tmp_path / "mxfp4", PUBLISHED, blocks))
    spec = load_spec(checkpoint)
    with pytest.raises(CheckpointError, match="down_proj"):
        load_weights(checkpoint, spec)


@pytest.mark.parametrize("key", ["swiglu_limit", "swiglu_alpha"])
def test_another_activation_than_that_of_gpt_oss_is_refused(tmp_path: Path, key: str) -> None:
    other = replace(CASE, config={**CASE.config, key: 3.0})
    with pytest.raises(UnsupportedModel, match=key):
        load_spec(open_checkpoint(other.write(tmp_path)))
