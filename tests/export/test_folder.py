"""Folders: what is written is the model, to the bit where nothing is rounded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.safetensors import SafetensorsFile
from localllm.errors import CheckpointError, InvalidRequest, UnsupportedModel
from localllm.export import write_folder
from localllm.tokenizer import load_tokenizer
from tests.export.cases import (
    AS_GGUF,
    EVERY,
    FOLDERS_ONLY,
    adapted_logits,
    add_adapter,
    logits,
    source,
    write,
)
from tests.models.running import TOLERANCE, difference
from tests.tiny_model import write_tiny_model


@pytest.mark.parametrize("name", [*EVERY, *FOLDERS_ONLY])
def test_a_folder_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    model = write(name, tmp_path)
    with source(model) as opened:
        write_folder(opened, tmp_path / "out")
    assert np.array_equal(logits(tmp_path / "out", name), logits(model, name))


@pytest.mark.parametrize("name", AS_GGUF)
def test_a_gguf_file_becomes_a_folder_with_the_same_logits(name: str, tmp_path: Path) -> None:
    """Its metadata becomes a config, its tensors get their hub names, rows and norms back."""
    model = write(name, tmp_path, "gguf")
    with source(model) as opened:
        write_folder(opened, tmp_path / "out", "float32")
    assert difference(logits(tmp_path / "out", name), logits(model, name)) < 1e-6


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "name", ["llama-gqa", "phi3-mha", "gpt2-tied", "qwen2-gqa", "qwen3_next-sparse-step"]
)
def test_a_fused_model_computes_what_the_adapter_did(name: str, dora: bool, tmp_path: Path) -> None:
    model = write(name, tmp_path)
    adapter = add_adapter(model, tmp_path / "adapter", dora=dora)
    with source(model, adapter) as opened:
        written = write_folder(opened, tmp_path / "out")
    assert written.changed > 0
    wanted = adapted_logits(model, adapter, name)
    assert difference(logits(tmp_path / "out", name), wanted) < TOLERANCE
    assert difference(wanted, logits(model, name)) > 0.05, "the adapter must matter here"


def test_a_type_rounds_and_is_what_the_file_has(tmp_path: Path) -> None:
    model = write("llama-gqa", tmp_path)
    for form, stored in (("float16", "F16"), ("bfloat16", "BF16")):
        with source(model) as opened:
            write_folder(opened, tmp_path / form, form)
        file = SafetensorsFile(tmp_path / form / "model.safetensors")
        assert {tensor.dtype for tensor in file.tensors.values()} == {stored}
        file.close()
        config = json.loads((tmp_path / form / "config.json").read_text())
        assert config["dtype"] == form
        far = difference(logits(tmp_path / form, "llama-gqa"), logits(model, "llama-gqa"))
        assert 0 < far < 0.05


class TestQuantized:
    @pytest.fixture
    def model(self, smollm2: Path) -> Path:
        return smollm2

    def test_is_never_rounded_again_unasked(self, model: Path, tmp_path: Path) -> None:
        adapter = add_adapter(model, tmp_path / "adapter", scale=0.4)
        with (
            source(model, adapter) as opened,
            pytest.raises(InvalidRequest, match="210 of the weights") as error,
        ):
            write_folder(opened, tmp_path / "out")
        assert "--dequantize" in str(error.value.hint)
        assert "--requantize" in str(error.value.hint)
        assert not (tmp_path / "out").exists()

    def test_codes_that_nothing_changed_stay_as_they_are(self, model: Path, tmp_path: Path) -> None:
        """GGUF's Q4_1 and Q8_0 are affine groups, which MLX's packing holds without loss."""
        with source(model) as opened:
            write_folder(opened, tmp_path / "out", "requantize")
            before, spec = opened.checkpoint, opened.spec
            from localllm.models import load_weights

            after = open_checkpoint(tmp_path / "out")
            ours = dict(load_weights(before, spec, only={"layers.3.attn.q.weight"}))
            theirs = dict(load_weights(after, spec, only={"layers.3.attn.q.weight"}))
            for name, tensor in ours.items():
                assert np.array_equal(tensor.to_float32(), theirs[name].to_float32())
            after.close()
        assert before.format == "gguf"
        settings = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
        assert (settings["bits"], settings["group_size"]) == (4, 32)

    def test_k_quants_have_no_place_in_a_folder(self, gemma3: Path, tmp_path: Path) -> None:
        with (
            source(gemma3) as opened,
            pytest.raises(UnsupportedModel, match="groups of 16") as error,
        ):
            write_folder(opened, tmp_path / "out", "requantize")
        assert "--dequantize" in str(error.value.hint)

    def test_a_dense_model_has_nothing_to_requantize(self, tmp_path: Path) -> None:
        model = write("llama-gqa", tmp_path)
        with source(model) as opened, pytest.raises(InvalidRequest, match="not quantized"):
            write_folder(opened, tmp_path / "out", "requantize")


def test_tokenizer_and_template_go_along(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    with source(model) as opened:
        write_folder(opened, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    ours, theirs = load_tokenizer(model), load_tokenizer(tmp_path / "out")
    assert ours is not None
    assert theirs is not None
    assert theirs.chat_template == ours.chat_template


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    model = write("llama-gqa", tmp_path)
    with source(model) as opened, pytest.raises(InvalidRequest, match="is there already"):
        write_folder(opened, model)
    (tmp_path / "out").mkdir()
    with source(model) as opened:
        write_folder(opened, tmp_path / "out")  # empty is as good as new


def test_a_full_disk_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write("llama-gqa", tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with source(model) as opened, pytest.raises(CheckpointError, match="No space left"):
        write_folder(opened, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if "safetensors" in path.name]
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    """Of a folder made from a GGUF file where there is one: config and names are all ours."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from scripts.goldens.models import _load
    from tests.models.running import golden

    model = write(name, tmp_path, "gguf" if name in AS_GGUF else "folder")
    with source(model) as opened:
        write_folder(opened, tmp_path / "out", "float32")
    config = json.loads((tmp_path / "out/config.json").read_text())
    theirs = _load(config, tmp_path / "out")
    with torch.no_grad():
        found = theirs(torch.tensor([golden(name).tokens]), use_cache=False).logits[0].numpy()
    assert difference(found, logits(model, name)) < TOLERANCE
