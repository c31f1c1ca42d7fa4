"""Tiny models of every architecture, as folders and as GGUF, with adapters for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from localllm.adapters.writing import save_adapter
from localllm.checkpoint import open_checkpoint
from localllm.export import Source, open_source
from localllm.models import load_spec
from localllm.spec import DecoderSpec
from tests.adapters.layouts import Settings, layout, linears, parameters
from tests.models.gguf_writer import ARCHITECTURES, write_gguf
from tests.models.running import backend, golden, golden_names, whole_prompt

# One or two of each architecture; the rest of the goldens differ in what exports do not touch.
EVERY = [
    "llama-gqa", "llama-llama3-bias-head-dim", "llama-yarn", "mistral-head-dim", "mixtral-top2",
    "qwen2-gqa", "qwen3-head-dim", "qwen3_moe-norm-topk", "gemma2-softcaps", "gemma3-pattern",
    "gemma3-linear", "phi3-mha", "phi3-longrope-short", "smollm3-nope", "olmo2-mha",
    "olmo2-gqa-tied", "granite-multipliers", "starcoder2-tied", "gpt2-tied", "seed_oss-gqa",
    "ministral3-yarn-growth", "mistral3-ministral", "olmo3-pattern-yarn", "exaone4-full-tied",
    "glm4-gqa", "glm4_moe-one-dense", "glm4_moe-not-renormalized-yarn", "lfm2-layer-types",
    "lfm2_moe-one-dense", "gemma4-dense-keys-as-values", "gemma4-experts", "gemma4-multimodal",
    "qwen3_5-square-heads", "qwen3_5_moe-square-heads", "qwen3_next-square-heads",
]  # fmt: skip
# Their experts are written as GGUF alone.
GGUF_ONLY = ["gpt_oss-top2-yarn"]
FOLDERS_ONLY = [
    "exaone4-pattern", "olmo3-rope-parameters-tied", "qwen3_moe-sparse-step", "qwen3_5-multimodal",
    "qwen3_5_moe-pattern", "qwen3_next-sparse-step", "lfm2-old-config-bias",
    "lfm2_moe-not-renormalized", "gemma4-per-layer-shared",
]  # fmt: skip
assert {*EVERY, *FOLDERS_ONLY, *GGUF_ONLY} <= set(golden_names())
AS_GGUF = [name for name in EVERY if golden(name).config["model_type"] in ARCHITECTURES]


def write(name: str, folder: Path, form: str = "folder") -> Path:
    """form: "folder" or "gguf"."""
    case = golden(name)
    if form == "folder":
        return case.write(folder / "model")
    return write_gguf(folder / "model.gguf", case.config, case.tensors())


def spec_of(path: Path) -> DecoderSpec:
    checkpoint = open_checkpoint(path)
    try:
        return load_spec(checkpoint)
    finally:
        checkpoint.close()


def add_adapter(
    model: Path, folder: Path, *, dora: bool = False, scale: float = 4.0, experts: bool = True
) -> Path:
    settings = Settings(alpha=8, dora=dora)
    spec = spec_of(model)
    targets = [target for target in linears(spec) if experts or ".moe." not in target]
    made = layout(spec, settings, targets=targets, rank=lambda target: 3 + ("down" in target))
    values = parameters(made) * np.float32(scale)
    return save_adapter(folder, made, values, config=settings, base_model="base", spec=spec)


@contextmanager
def source(model: Path, adapter: Path | None = None) -> Iterator[Source]:
    with open_source(str(model), adapter) as opened:
        yield opened


def logits(path: Path, name: str) -> np.ndarray:
    """float32 [T, V] on the reference backend, of the golden's own tokens."""
    tokens = golden(name).tokens
    running = backend(path, len(tokens))
    try:
        return whole_prompt(running, tokens)
    finally:
        running.close()


def adapted_logits(path: Path, adapter: Path, name: str) -> np.ndarray:
    """The same with the adapter beside the model, not merged."""
    from tests.adapters.test_parity import logits as run
    from tests.adapters.test_parity import opened

    running, loaded = opened(path, "reference", adapter)
    return run(running, golden(name).tokens, running.add_adapter(loaded))
