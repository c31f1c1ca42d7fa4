"""Writes tests/models/golden/gguf_*.json: what transformers makes of published GGUF files.

transformers reads the file itself (and dequantizes it to float32), so nothing of ours is in the
expected values. Kept are the largest logits at some positions of a fixed run of tokens.

    python scripts/goldens/models_gguf.py [smollm2.gguf gemma3.gguf]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # instead of this folder, whose modules hide libraries by their names
    sys.path[0] = str(ROOT)

from tests.models.tiny import random_tokens  # noqa: E402

# name -> (catalog name, tokens); Gemma's are more than its window of 512.
MODELS = {"gguf_smollm2": ("smollm2:135m", 40), "gguf_gemma3": ("gemma3:270m", 540)}
TOP = 20
ROWS = 6


def reference_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """float32 [T, V]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


def write_golden(name: str, path: Path, count: int) -> None:
    tokens = random_tokens(count, 40000)
    logits = reference_logits(path, tokens)
    positions = np.linspace(0, count - 1, ROWS).astype(int)
    rows = []
    for position in positions:
        ids = np.argsort(-logits[position], kind="stable")[:TOP]
        values = [round(float(x), 5) for x in logits[position][ids]]
        rows.append({"position": int(position), "ids": ids.tolist(), "logits": values})
    golden = {"tokens": tokens, "rows": rows}
    (ROOT / f"tests/models/golden/{name}.json").write_text(json.dumps(golden) + "\n")
    print(f"{name}: {ROWS} rows, largest logit {np.abs(logits).max():.2f}")


def main() -> None:
    paths = [Path(path) for path in sys.argv[1:]]
    if not paths:
        from localllm.hub import resolve

        paths = [resolve(model).path for model, _ in MODELS.values()]
    for (name, (_, count)), path in zip(MODELS.items(), paths, strict=True):
        write_golden(name, path, count)


if __name__ == "__main__":
    main()
