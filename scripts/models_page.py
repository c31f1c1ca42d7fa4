"""Prints docs/models.md: every family on every backend, measured now.

Run from the root: python -m scripts.models_page > docs/models.md
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from localllm.backend.cpu import CpuBackend  # noqa: E402
from localllm.backend.metal import MetalBackend  # noqa: E402
from localllm.backend.protocol import Backend, Batch, Chunk, StateSlots  # noqa: E402
from localllm.backend.reference import ReferenceBackend  # noqa: E402
from localllm.checkpoint.opening import open_checkpoint  # noqa: E402
from localllm.models import known_architectures, load_spec, load_weights  # noqa: E402
from localllm.spec import DecoderSpec  # noqa: E402
from scripts.parity_table import markdown  # noqa: E402
from tests.models.running import Golden, difference, golden, golden_names, golden_version  # noqa: E402

FAMILIES = {
    "llama": "Llama 2 and 3, SmolLM2, and what shares their layers",
    "mistral": "Mistral 7B, Nemo, Small",
    "ministral3": "Ministral 3",
    "mistral3": "Mistral Small 3.1 and Ministral 3 with their vision tower left out",
    "mixtral": "Mixtral",
    "qwen2": "Qwen 2 and 2.5",
    "qwen3": "Qwen 3, dense",
    "qwen3_moe": "Qwen 3 30B-A3B, 235B-A22B",
    "qwen3_5": "Qwen 3.5, dense, text",
    "qwen3_5_moe": "Qwen 3.5 35B-A3B and larger, text",
    "qwen3_next": "Qwen3-Next 80B-A3B",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3, text",
    "gemma4": "Gemma 4, text: dense, 26B-A4B, E2B and E4B",
    "phi3": "Phi 3, 3.5 and 4",
    "smollm3": "SmolLM3",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "exaone4": "EXAONE 4",
    "glm4": "GLM 4 (0414)",
    "glm4_moe": "GLM 4.5, 4.5 Air, 4.6, 4.7",
    "seed_oss": "Seed-OSS",
    "granite": "Granite 3",
    "starcoder2": "StarCoder2",
    "gpt_oss": "gpt-oss 20B, 120B",
    "gpt2": "GPT-2",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2 8B-A1B",
}
_BLOCK = 32
_BLOCKS = 4


def _slots(spec: DecoderSpec) -> int:
    """A step of a model with recurrent layers reads one state and writes another."""
    return 2 if any(spec.recurrences) else 0


def _reference(folder: Path) -> Backend:
    checkpoint = open_checkpoint(folder)
    spec = load_spec(checkpoint)
    weights = load_weights(checkpoint, spec)
    return ReferenceBackend(
        spec, weights, num_blocks=_BLOCKS, block_size=_BLOCK, state_slots=_slots(spec)
    )


def _cpu(folder: Path) -> Backend:
    checkpoint = open_checkpoint(folder)
    spec = load_spec(checkpoint)
    return CpuBackend(
        spec,
        load_weights(checkpoint, spec),
        num_blocks=_BLOCKS,
        block_size=_BLOCK,
        kv_bits=32,
        float_activations=True,
        state_slots=_slots(spec),
    )


def _metal(folder: Path) -> Backend:
    checkpoint = open_checkpoint(folder)
    spec = load_spec(checkpoint)
    return MetalBackend(
        spec,
        load_weights(checkpoint, spec),
        num_blocks=_BLOCKS,
        block_size=_BLOCK,
        dtype=mx.float32,
        state_slots=_slots(spec),
    )


_BACKENDS: dict[str, Callable[[Path], Backend]] = {
    "reference": _reference,
    "cpu": _cpu,
    "metal": _metal,
}


def _worst(cases: list[Golden], opened: Callable[[Path], Backend]) -> str:
    """The largest difference of all cases, as a share of the largest |logit|."""
    found = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            running = opened(case.write(Path(folder)))
            count = len(case.tokens)
            chunk = Chunk(
                token_ids=np.array(case.tokens, np.int32),
                start=0,
                block_table=np.arange(_BLOCKS, dtype=np.int32),
                logit_rows=tuple(range(count)),
                prompt_length=count,
                state=StateSlots(None, 0) if any(running.spec.recurrences) else None,
            )
            found.append(difference(running.forward(Batch((chunk,))), case.whole))
            running.close()
    return f"{max(found):.0e}"


def main() -> None:
    print("# Models\n")
    print(
        "Architectures by their `model_type`, each held against the logits of transformers "
        f"{golden_version()}\nfor small random models of at least three shapes (the "
        "configs are in scripts/goldens/models.py).\nA figure is the largest difference over "
        "all cases of the family, as a share of the largest logit.\n`cpu`: with float32 "
        "activations and KV cache, which leaves out the rounding to 8 bits. `metal`: its "
        "graph\nin float32 on MLX's own ops, on this machine's processor; that the kernels "
        "give the same is held by\ntests/backend/test_metal.py in the emulator.\n\nOnly SmolLM2 "
        "135M (llama) and Gemma 3 270M were also run with their real weights; everything else is\n"
        "proven on random weights alone. `python -m scripts.models_page` prints this page anew.\n"
    )
    kinds = [k for k in known_architectures() if not k.endswith("_text")]
    missing = set(kinds) - FAMILIES.keys()
    assert not missing, f"say what {missing} are"
    rows = []
    for kind in kinds:
        cases = [golden(name) for name in golden_names() if name.split("-")[0] == kind]
        figures = [_worst(cases, opened) for opened in _BACKENDS.values()]
        rows.append((f"`{kind}`", FAMILIES[kind], str(len(cases)), *figures))
        print(kind, *figures, file=sys.stderr)
    print(markdown(("Architecture", "Models", "Cases", *_BACKENDS), rows))


if __name__ == "__main__":
    main()
