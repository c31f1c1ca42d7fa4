"""Adapters compute what PEFT computes, over every form of their base model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localllm.adapters import LoraAdapter, load_adapter, weights_in
from localllm.backend.cpu import CpuBackend
from localllm.backend.protocol import Backend, Batch, Chunk, StateSlots
from localllm.backend.reference import ReferenceBackend
from localllm.checkpoint import Dense, open_checkpoint
from localllm.errors import UnsupportedModel
from localllm.export import open_source, write_adapter_gguf, write_folder
from localllm.models import load_spec, load_weights
from tests.adapters.tiny import adapter_tensors, write_adapter
from tests.models.gguf_writer import ARCHITECTURES, write_gguf
from tests.models.running import TOLERANCE, Golden, difference, golden

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


@dataclass(frozen=True)
class Case:
    model: str
    dtype: str
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    logits: np.ndarray

    @property
    def base(self) -> Golden:
        return golden(self.model)

    def tensors(self) -> dict[str, Dense]:
        return adapter_tensors(self.shapes, self.dtype)

    def write(self, folder: Path) -> Path:
        return write_adapter(folder, self.config, self.tensors())


def case_of(name: str) -> Case:
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return Case(**facts, logits=arrays["logits"])


# llama.cpp has no place for the biases of LFM2's convolutions.
AS_GGUF = [
    name
    for name in NAMES
    if case_of(name).base.config["model_type"] in ARCHITECTURES and name != "lfm2-mixers-biases"
]


def opened(path: Path, backend: str, adapter: Path) -> tuple[Backend, LoraAdapter]:
    checkpoint = open_checkpoint(path)
    spec = load_spec(checkpoint)
    weights = load_weights(checkpoint, spec)
    running: Backend
    if backend == "reference":
        running = ReferenceBackend(spec, weights, num_blocks=4, state_slots=2)
    else:
        running = CpuBackend(
            spec,
            weights,
            num_blocks=4,
            state_slots=2,
            threads=2,
            kv_bits=32,
            float_activations=True,
        )
    return running, load_adapter(adapter, spec, base=weights_in(path, spec))


def logits(running: Backend, tokens: list[int], adapter: int | None) -> np.ndarray:
    ids, rows = np.array(tokens, np.int32), tuple(range(len(tokens)))
    state = StateSlots(None, 1) if running.state_slots else None
    chunk = Chunk(ids, 0, np.arange(4), rows, len(tokens), adapter, state)
    return running.forward(Batch((chunk,)))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_match_peft(name: str, backend: str, tmp_path: Path) -> None:
    case = case_of(name)
    base = case.base
    running, adapter = opened(
        base.write(tmp_path / "model"), backend, case.write(tmp_path / "adapter")
    )
    index = running.add_adapter(adapter)
    assert difference(logits(running, base.tokens, index), case.logits) < TOLERANCE
    assert difference(logits(running, base.tokens, None), base.whole) < TOLERANCE
    assert difference(case.logits, base.whole) > 0.1, "the adapter must matter here"


@pytest.mark.parametrize("name", AS_GGUF)
def test_an_adapter_of_the_hub_model_fits_the_same_model_as_gguf(name: str, tmp_path: Path) -> None:
    """llama.cpp reorders q and k of some architectures, splits and renames."""
    case = case_of(name)
    base = case.base
    path = write_gguf(tmp_path / "model.gguf", base.config, base.tensors())
    running, adapter = opened(path, "cpu", case.write(tmp_path / "adapter"))
    index = running.add_adapter(adapter)
    assert difference(logits(running, base.tokens, index), case.logits) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3_moe-experts", "glm4_moe-one-layers-down"])
def test_an_adapter_on_experts_may_be_merged(name: str, tmp_path: Path) -> None:
    case = case_of(name)
    model, adapter = case.base.write(tmp_path / "model"), case.write(tmp_path / "adapter")
    with open_source(str(model), adapter) as source:
        write_folder(source, tmp_path / "fused")
        with pytest.raises(UnsupportedModel, match="on experts") as refused:
            write_adapter_gguf(source, tmp_path / "adapter.gguf")
    assert "merged" in refused.value.hint
    running, _ = opened(tmp_path / "fused", "cpu", adapter)
    assert difference(logits(running, case.base.tokens, None), case.logits) < TOLERANCE


def test_an_mlx_folder_is_the_same_adapter_as_its_peft_twin(tmp_path: Path) -> None:
    case = replace(case_of("llama-defaults"))
    base = case.base
    spec = load_spec(open_checkpoint(base.write(tmp_path / "model")))
    twin = load_adapter(case.write(tmp_path / "peft"), spec)
    tensors = {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.weight", ".lora_a")
        .replace(".lora_B.weight", ".lora_b"): Dense(np.ascontiguousarray(t.data.T), t.dtype)
        for name, t in case.tensors().items()
    }
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {
            "rank": case.config["r"],
            "scale": case.config["lora_alpha"] / case.config["r"],
            "dropout": 0.0,
            "keys": ["self_attn.q_proj", "self_attn.v_proj"],
        },
    }
    folder = write_adapter(tmp_path / "mlx", config, tensors, "adapters.safetensors")
    found = load_adapter(folder, spec, name="mlx")
    assert found.digest == twin.digest
    assert (found.name, twin.name) == ("mlx", "peft")


def test_parts_of_a_fused_module_share_a_and_have_rows_of_b(tmp_path: Path) -> None:
    case = case_of("phi3-all-linear")
    spec = load_spec(open_checkpoint(case.base.write(tmp_path / "model")))
    targets = load_adapter(case.write(tmp_path / "adapter"), spec).targets
    assert set(targets) == {
        f"layers.{layer}.{stem}"
        for layer in (0, 1)
        for stem in (
            "attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down",
        )
    }  # fmt: skip
    q, k, v = (targets[f"layers.0.attn.{part}"] for part in "qkv")
    assert q.a is k.a is v.a
    whole = case.tensors()["base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"]
    assert np.array_equal(np.concatenate([q.b.data, k.b.data, v.b.data]), whole.data)
    assert {pair.b.dtype for pair in targets.values()} == {"float16"}


def test_the_digest_is_of_what_the_adapter_computes(tmp_path: Path) -> None:
    case = case_of("llama-defaults")
    spec = load_spec(open_checkpoint(case.base.write(tmp_path / "model")))
    first = load_adapter(case.write(tmp_path / "a"), spec)
    assert load_adapter(case.write(tmp_path / "b"), spec).digest == first.digest
    scaled = replace(case, config={**case.config, "lora_alpha": 9})
    assert load_adapter(scaled.write(tmp_path / "c"), spec).digest != first.digest
    tensors = case.tensors()
    name = next(iter(tensors))
    data = tensors[name].data.copy()
    data[0, 0] += 1
    changed = {**tensors, name: Dense(data, "float32")}
    write_adapter(tmp_path / "d", case.config, changed)
    assert load_adapter(tmp_path / "d", spec).digest != first.digest
