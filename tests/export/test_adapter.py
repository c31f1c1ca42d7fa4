"""Adapters as LoRA in GGUF: names, shapes and scale as llama.cpp reads them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from localllm.adapters import load_adapter
from localllm.errors import InvalidRequest, UnsupportedModel
from localllm.export import write_adapter_gguf
from tests.export.cases import add_adapter, source, spec_of, write
from tests.models.running import golden


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return {tensor.name: tensor.data for tensor in reader.tensors}, fields


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_the_file_holds_the_same_matrices_in_the_files_own_order(form: str, tmp_path: Path) -> None:
    """llama.cpp reorders rows of q and k, so B's rows must follow."""
    model = write("llama-gqa", tmp_path, form)
    adapter = add_adapter(model, tmp_path / "adapter")
    with source(model, adapter) as opened:
        write_adapter_gguf(opened, tmp_path / "lora.gguf")
    tensors, fields = read(tmp_path / "lora.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    targets = load_adapter(adapter, spec_of(model)).targets
    alpha = fields["adapter.lora.alpha"]
    config = golden("llama-gqa").config
    head = config["hidden_size"] // config["num_attention_heads"]
    for target, name in (
        ("layers.0.attn.q", "attn_q"), ("layers.1.attn.k", "attn_k"),
        ("layers.0.attn.o", "attn_output"), ("layers.1.ffn.down", "ffn_down"),
    ):  # fmt: skip
        pair = targets[target]
        stem = f"blk.{target.split('.')[1]}.{name}.weight"
        a, b = tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"]
        if name in ("attn_q", "attn_k"):  # (0, 1, 2, …) of a head lie as (0, d/2, 1, …)
            halves = b.reshape(-1, head // 2, 2, b.shape[1])
            b = halves.swapaxes(1, 2).reshape(b.shape)
        delta = np.float32(alpha) / a.shape[0] * (b @ a)
        assert np.allclose(delta, pair.delta(), rtol=1e-5, atol=1e-7)


def test_fused_tensors_get_one_pair_for_all_their_parts(tmp_path: Path) -> None:
    model = write("phi3-mha", tmp_path)
    adapter = add_adapter(model, tmp_path / "adapter")
    with source(model, adapter) as opened:
        written = write_adapter_gguf(opened, tmp_path / "lora.gguf")
        targets = opened.adapter.targets if opened.adapter else {}
    tensors, fields = read(tmp_path / "lora.gguf")
    stem = next(name for name in tensors if "blk.0.ffn_up" in name).removesuffix(".lora_a")
    stem = stem.removesuffix(".lora_b")
    a, b = tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"]
    both = np.concatenate(
        [targets["layers.0.ffn.gate"].delta(), targets["layers.0.ffn.up"].delta()]
    )
    alpha = np.float32(fields["adapter.lora.alpha"])
    assert np.allclose(alpha / a.shape[0] * (b @ a), both, rtol=1e-5, atol=1e-7)
    assert written.pairs < len(targets)


def test_dora_has_no_place_there(tmp_path: Path) -> None:
    model = write("llama-gqa", tmp_path)
    adapter = add_adapter(model, tmp_path / "adapter", dora=True)
    with source(model, adapter) as opened, pytest.raises(UnsupportedModel, match="no DoRA"):
        write_adapter_gguf(opened, tmp_path / "lora.gguf")


def test_without_an_adapter_there_is_nothing_to_write(tmp_path: Path) -> None:
    model = write("llama-gqa", tmp_path)
    with source(model) as opened, pytest.raises(InvalidRequest, match="no adapter"):
        write_adapter_gguf(opened, tmp_path / "lora.gguf")
