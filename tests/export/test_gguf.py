"""GGUF files: read back here they are the same model; what the format cannot say is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.form import form_of
from localllm.checkpoint.gguf import GGUFCheckpoint
from localllm.checkpoint.tensor import Affine
from localllm.errors import CheckpointError, InvalidRequest, UnsupportedModel
from localllm.export import k_quants, write_gguf
from localllm.models import load_forms, qwen3_5, spec_of_config
from localllm.models.writing import stored_tensors
from localllm.tokenizer import load_tokenizer
from localllm.tokenizer.hub_files import hub_tokenizer_files
from tests.export.cases import (
    AS_GGUF,
    EVERY,
    GGUF_ONLY,
    adapted_logits,
    add_adapter,
    logits,
    source,
    write,
)
from tests.models import test_gpt_oss as gpt_oss
from tests.models.running import TOLERANCE, difference, golden
from tests.models.test_gguf import nvfp4_model
from tests.models.tiny import random_tensors, write_checkpoint
from tests.tiny_model import write_tiny_model
from tests.tokenizer.test_gguf import byte_pairs
from tests.tokenizer.test_written import CHAT


@pytest.mark.parametrize("name", [*EVERY, *GGUF_ONLY])
def test_a_folder_becomes_a_file_with_the_same_logits(name: str, tmp_path: Path) -> None:
    model = write(name, tmp_path)
    with source(model) as opened:
        write_gguf(opened, tmp_path / "out.gguf", "f32")
    assert difference(logits(tmp_path / "out.gguf", name), logits(model, name)) < 2e-5


def test_blocks_of_mxfp4_stay_as_they_are(tmp_path: Path) -> None:
    """A block whose values are all small may be told by another exponent, of the same weights."""
    model = gpt_oss.folder(tmp_path / "model", gpt_oss.PUBLISHED, gpt_oss.tensors()[1])
    with source(model) as opened:
        written = write_gguf(opened, tmp_path / "out.gguf")
        before = {name: tensor.to_float32() for name, tensor in opened.weights()}
    assert written.kinds["MXFP4"] == 6
    with source(tmp_path / "out.gguf") as opened:
        after = {name: tensor.to_float32() for name, tensor in opened.weights()}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["keep", "f32"])
def test_the_factors_of_nvfp4_stay_beside_it_or_go_into_the_weights(
    kind: Any, tmp_path: Path
) -> None:
    model, _ = nvfp4_model(tmp_path)
    with source(model) as opened:
        write_gguf(opened, tmp_path / "out.gguf", kind)
        before = {name: tensor.to_float32() for name, tensor in opened.weights()}
    with source(tmp_path / "out.gguf") as opened:
        after = {name: tensor.to_float32() for name, tensor in opened.weights()}
        assert ("blk.0.attn_q.scale" in opened.checkpoint) == (kind == "keep")
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", AS_GGUF)
def test_a_file_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    model = write(name, tmp_path, "gguf")
    with source(model) as opened:
        write_gguf(opened, tmp_path / "out.gguf")
    before, after = open_checkpoint(model), open_checkpoint(tmp_path / "out.gguf")
    assert after.config == before.config
    assert set(after.names()) == set(before.names())
    for tensor in before.names():
        assert np.array_equal(before.tensor(tensor).data, after.tensor(tensor).data)
    before.close()
    after.close()


@pytest.mark.parametrize("form", ["folder", "gguf"])
@pytest.mark.parametrize("name", ["llama-gqa", "phi3-mha", "gpt2-tied", "gemma3-pattern"])
def test_an_adapter_is_merged_whatever_the_file_reorders(
    name: str, form: str, tmp_path: Path
) -> None:
    model = write(name, tmp_path, form)
    adapter = add_adapter(model, tmp_path / "adapter")
    with source(model, adapter) as opened:
        write_gguf(opened, tmp_path / "out.gguf", "f32")
    wanted = adapted_logits(model, adapter, name)
    assert difference(logits(tmp_path / "out.gguf", name), wanted) < TOLERANCE


def test_a_real_file_is_copied_tensor_by_tensor_and_key_by_key(
    smollm2: Path, tmp_path: Path
) -> None:
    with source(smollm2) as opened:
        written = write_gguf(opened, tmp_path / "out.gguf")
    assert written.kinds == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    assert written.changed == 0
    before, after = open_checkpoint(smollm2), open_checkpoint(written.path)
    assert isinstance(before, GGUFCheckpoint)
    assert isinstance(after, GGUFCheckpoint)
    new = {"general.file_type", "general.quantization_version"}
    assert {k: v for k, v in after.config.items() if k not in new} == {
        k: v for k, v in before.config.items() if k not in new
    }
    assert all(after.kinds[key] == kind for key, kind in before.kinds.items() if key not in new)
    for name in before.names():
        assert np.array_equal(before.raw(name), after.raw(name))
    before.close()
    after.close()


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_types_round_as_the_format_does(kind: str, tmp_path: Path) -> None:
    """As the gguf package, which follows llama.cpp, dequantizes what it quantized itself."""
    model = write_tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=96)
    with source(model) as opened:
        write_gguf(opened, tmp_path / "out.gguf", kind)  # type: ignore[arg-type]
        weights = dict(opened.weights({"layers.1.ffn.down.weight", "layers.0.attn_norm.weight"}))
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == kind.upper()
    exact = weights["layers.1.ffn.down.weight"].to_float32()
    wanted = gguf.quants.dequantize(gguf.quants.quantize(exact, down.tensor_type), down.tensor_type)
    ours = open_checkpoint(tmp_path / "out.gguf")
    assert np.array_equal(ours.tensor("blk.1.ffn_down.weight").to_float32(), wanted)
    ours.close()
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize(("kind", "worse"), [("Q4_K", "Q4_1"), ("Q6_K", "Q5_1")])
def test_k_quants_round_better_than_simpler_types_of_their_size(kind: str, worse: str) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(24, 1024)) * random.gamma(1, 1, size=(24, 1))
    values[0], values[1, :256] = 0, 0.25
    values[2], values[3] = np.abs(values[2]), -np.abs(values[3])
    exact = values.astype(np.float32)

    def error(name: str, encoded: np.ndarray) -> float:
        found = gguf.quants.dequantize(encoded, gguf.GGMLQuantizationType[name])
        assert np.array_equal(found[0], exact[0])
        return float(np.square(found - exact).sum())

    simpler = gguf.quants.quantize(exact, gguf.GGMLQuantizationType[worse])
    assert error(kind, k_quants.quantize(exact, kind)) < error(worse, simpler)


@pytest.mark.parametrize(("kind", "instead"), [("q4_k", "Q5_0"), ("q6_k", "Q8_0")])
def test_k_quants_are_read_back_and_narrow_rows_get_another_type(
    kind: str, instead: str, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "model", hidden_size=256, intermediate_size=96)
    with source(model) as opened:
        written = write_gguf(opened, tmp_path / "out.gguf", kind)  # type: ignore[arg-type]
        weights = dict(opened.weights({"layers.1.ffn.up.weight"}))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written.path).tensors}
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == instead
    up = tensors["blk.1.ffn_up.weight"]
    assert up.tensor_type.name == kind.upper()
    wanted = gguf.quants.dequantize(up.data, up.tensor_type)
    ours = open_checkpoint(written.path)
    assert np.array_equal(ours.tensor("blk.1.ffn_up.weight").to_float32(), wanted)
    ours.close()
    exact = weights["layers.1.ffn.up.weight"].to_float32()
    assert np.abs(wanted - exact).max() < 0.1 * np.abs(exact).max()


def test_quantized_value_heads_move_with_their_groups(tmp_path: Path) -> None:
    """Qwen 3.5 in GGUF has the inputs of a delta net's last matrix in another order."""
    sizes = {"hidden_size": 64, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
    config = {**golden("qwen3_5-square-heads").config, **sizes, "intermediate_size": 64}
    spec = spec_of_config(config, tmp_path)
    shapes = {one.name: one.shape for one in stored_tensors(spec, qwen3_5.NAMES, "model.")}
    model = write_checkpoint(tmp_path / "model", config, random_tensors(shapes))
    with source(model) as opened:
        write_gguf(opened, tmp_path / "out.gguf", "q8_0")
        before = {name: tensor.to_float32() for name, tensor in opened.weights()}
    with source(tmp_path / "out.gguf") as opened:
        forms = load_forms(opened.checkpoint, opened.spec)
        after = dict(opened.weights())
    assert isinstance(after["layers.1.delta.o.weight"], Affine)
    for name, tensor in after.items():
        assert forms[name] == form_of(tensor)
        wanted = before[name] + (name.endswith("norm.weight") and ".delta." not in name)
        assert np.abs(tensor.to_float32() - wanted).max() < 0.02, name


def test_widths_that_no_block_divides_stay_in_16_bits(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", hidden_size=40, num_attention_heads=4)
    with source(model) as opened:
        written = write_gguf(opened, tmp_path / "out.gguf", "q8_0")
    assert written.kinds["F16"] > 0
    assert "Q8_0" not in {
        tensor.tensor_type.name
        for tensor in gguf.GGUFReader(written.path).tensors
        if tensor.shape[0] == 40
    }


def test_vocabulary_template_and_ends_go_along(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", vocab_size=300)
    metadata = {**byte_pairs(), "tokenizer.chat_template": CHAT}
    for name, text in hub_tokenizer_files(metadata).items():
        (model / name).write_text(text, "utf-8")
    with source(model) as opened:
        write_gguf(opened, tmp_path / "out.gguf")
    ours, theirs = load_tokenizer(model), load_tokenizer(tmp_path / "out.gguf")
    assert ours is not None
    assert theirs is not None
    chat = [{"role": "user", "content": "hello wo, </s>!"}]
    assert theirs.apply_chat(chat) == ours.apply_chat(chat)
    assert theirs.bos_id == ours.bos_id
    assert theirs.eos_ids <= ours.eos_ids  # config.json names another one, of its own vocabulary


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("gpt2-scaled-by-depth", r"layers\.0\.mixer\.scale"),
        ("gpt2-inner-untied", "activation is 'gelu'"),
        ("gemma2-layer-types-untied", "scale is"),
        ("gemma2-no-softcaps", "biases"),
        ("gemma3-multimodal", "scale is"),
        ("smollm3-window", "sliding_window"),
        ("llama-dynamic", "'dynamic'"),
        ("qwen2-layer-types", "sliding_window"),
        ("qwen3_moe-sparse-step", "dense layers"),
        ("olmo2-mqa-bias-yarn", "biases"),
        ("exaone4-pattern", "without windows"),
        ("olmo3-rope-parameters-tied", "windows at the base of its other layers"),
        ("gpt_oss-no-bias-default-rope", "biases"),
        ("gpt_oss-layer-types-mqa-tied", "default RoPE"),
        ("gemma4-per-layer-shared", "101 tokens, beside 97"),
        ("lfm2-old-config-bias", "biases"),
        ("lfm2_moe-not-renormalized", "renormalized"),
        ("qwen3_5-pattern", "keys are as long as values"),
        ("qwen3_5_moe-multimodal", "keys are as long as values"),
        ("qwen3_next-dense-layer", "dense layers"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused_by_name(
    name: str, named: str, tmp_path: Path
) -> None:
    """llama.cpp would load such files and run another model."""
    model = write(name, tmp_path)
    with source(model) as opened, pytest.raises(UnsupportedModel, match=named):
        write_gguf(opened, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_windows_that_llamacpp_ignores_are_told(tmp_path: Path) -> None:
    model = write("mistral-window", tmp_path)
    with source(model) as opened:
        written = write_gguf(opened, tmp_path / "out.gguf")
    assert len(written.notes) == 1
    assert "ignores the window" in written.notes[0]


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write("llama-gqa", tmp_path)

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with source(model) as opened, pytest.raises(CheckpointError, match="No space left"):
        write_gguf(opened, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out.gguf*"))


def test_a_disk_that_fills_up_while_tensors_are_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy raises its own words, without an error number."""
    model = write("llama-gqa", tmp_path)

    def full(*array: object) -> None:
        raise OSError("Not enough free space to write 4096 bytes after offset 0")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with source(model) as opened, pytest.raises(CheckpointError, match="Not enough free space"):
        write_gguf(opened, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out.gguf*"))


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    model = write("llama-gqa", tmp_path)
    with source(model) as opened, pytest.raises(InvalidRequest, match="q3_x"):
        write_gguf(opened, tmp_path / "out.gguf", "q3_x")  # type: ignore[arg-type]
