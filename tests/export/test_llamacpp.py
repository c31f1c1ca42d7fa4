"""llama.cpp computes from our files what we compute: models, and adapters beside them.

Its libraries are those of node-llama-cpp; where they are not installed, these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localllm import LLM
from localllm.export import write_adapter_gguf, write_gguf
from localllm.export.compare import SAMPLE
from localllm.train.tokenizer import train_tokenizer
from scripts.parity.llamacpp import LlamaCpp, PeerMissing
from scripts.parity.llamacpp_abi import libraries
from tests.export.cases import EVERY, GGUF_ONLY, adapted_logits, add_adapter, logits, source, write
from tests.models.running import difference, golden
from tests.tiny_model import write_tiny_model

try:
    libraries()
except PeerMissing as missing:
    pytest.skip(str(missing), allow_module_level=True)

# GELU from a table of float16, and softmax in float16 with softcaps, are llama.cpp's own.
LOOSE = {
    "gemma2": 1e-2,
    "gemma3": 1e-2,
    "gemma4": 1e-2,
    "gpt2": 1e-3,
    "starcoder2": 1e-3,
}
# It takes the factors for long texts as soon as its context is longer than the original one.
NOT_ALIKE = ("phi3-longrope-short",)
ALIKE = [name for name in [*EVERY, *GGUF_ONLY] if name not in NOT_ALIKE]


def theirs(path: Path, tokens: list[int], lora: Path | None = None) -> np.ndarray:
    with LlamaCpp(path, context=256, kv_float32=True, flash_attention="off", lora=lora) as peer:
        return peer.decode(tokens, 0, all_logits=True).copy()


@pytest.mark.parametrize("name", ALIKE)
def test_models_and_adapters_give_the_same_logits(name: str, tmp_path: Path) -> None:
    tokens, allowed = golden(name).tokens, LOOSE.get(name.split("-")[0], 2e-5)
    model = write(name, tmp_path)
    # Adapters on experts are not written as LoRA in GGUF.
    adapter = add_adapter(model, tmp_path / "adapter", experts=False)
    with source(model, adapter) as opened:
        write_adapter_gguf(opened, tmp_path / "lora.gguf")
    with source(model) as opened:
        write_gguf(opened, tmp_path / "plain.gguf", "f32")
    assert difference(theirs(tmp_path / "plain.gguf", tokens), logits(model, name)) < allowed
    beside = theirs(tmp_path / "plain.gguf", tokens, tmp_path / "lora.gguf")
    wanted = adapted_logits(model, adapter, name)
    assert difference(beside, wanted) < allowed
    assert difference(wanted, logits(model, name)) > 0.05, "the adapter must matter here"


@pytest.mark.parametrize("kind", ["q6_k", "q4_k"])
def test_our_k_quants_are_theirs(kind: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 300}
    model = write_tiny_model(tmp_path / "model", tokenizer=False, **shape)
    train_tokenizer([SAMPLE], 300, model)
    with source(model) as opened:
        write_gguf(opened, tmp_path / "out.gguf", kind)  # type: ignore[arg-type]
    tokens = list(range(40, 72))
    with LLM(str(tmp_path / "out.gguf"), activations="float32", context=64) as llm:
        ours = llm.logits(tokens)
    # Theirs rounds activations to 8 bits.
    assert difference(theirs(tmp_path / "out.gguf", tokens), ours) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q6_k", "q4_k", "q4_1", "q4_0"])
def test_a_fused_model_has_the_same_perplexity(kind: str, smollm2: Path, tmp_path: Path) -> None:
    adapter = add_adapter(smollm2, tmp_path / "adapter", scale=0.4)
    with source(smollm2, adapter) as opened:
        write_gguf(opened, tmp_path / "out.gguf", kind)  # type: ignore[arg-type]
    with LLM(str(tmp_path / "out.gguf"), activations="float32", context=512) as llm:
        assert llm.tokenizer is not None
        tokens = llm.tokenizer.encode(SAMPLE)
        ours = perplexity(llm.logits(tokens), tokens)
    found = perplexity(theirs_long(tmp_path / "out.gguf", tokens), tokens)
    # Theirs rounds activations to 8 bits against quantized weights, and to 16 against 16.
    assert found == pytest.approx(ours, rel=2e-2 if kind.startswith("q") else 2e-3)


def theirs_long(path: Path, tokens: list[int]) -> np.ndarray:
    with LlamaCpp(path, context=512, kv_float32=True, flash_attention="off", threads=2) as peer:
        return peer.decode(tokens, 0, all_logits=True).copy()


def perplexity(values: np.ndarray, tokens: list[int]) -> float:
    wide = values[:-1].astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return float(np.exp(-wide[np.arange(len(wide)), tokens[1:]].mean()))
