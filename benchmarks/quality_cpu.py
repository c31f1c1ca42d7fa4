"""What 8-bit activations cost: perplexity and KL of the cpu backend against itself in float32.

    python benchmarks/quality_cpu.py [MODEL]

The text is English that every Python ships (`pydoc_data.topics`), the first 2,048 tokens of it.
"""

from __future__ import annotations

import sys
from pydoc_data.topics import topics

import numpy as np

from localllm import hub
from localllm.backend.cpu import CpuBackend
from localllm.backend.protocol import Batch, Chunk
from localllm.checkpoint import open_checkpoint
from localllm.models import load_spec, load_weights
from localllm.tokenizer import load_tokenizer

TOKENS = 2048
CHUNK = 256


def logprobs(path, ids: np.ndarray, *, float_activations: bool) -> np.ndarray:
    """float64 [T, V]: the log-probabilities after every token."""
    checkpoint = open_checkpoint(path)
    spec = load_spec(checkpoint)
    backend = CpuBackend(
        spec,
        load_weights(checkpoint, spec),
        num_blocks=TOKENS // 32,
        float_activations=float_activations,
    )
    table = np.arange(TOKENS // 32, dtype=np.int32)
    rows = []
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        chunk = Chunk(part, start, table, tuple(range(len(part))), len(ids))
        rows.append(backend.forward(Batch((chunk,))))
    backend.close()
    logits = np.concatenate(rows).astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m"
    path = hub.resolve(name).path
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    text = "\n".join(topics[key] for key in sorted(topics))[: 8 * TOKENS]
    ids = np.array(tokenizer.encode(text)[:TOKENS], np.int32)
    exact = logprobs(path, ids, float_activations=True)
    quick = logprobs(path, ids, float_activations=False)
    following = (np.arange(len(ids) - 1), ids[1:])
    for label, values in (("float32", exact), ("8 bits", quick)):
        print(f"{name}: activations in {label}: perplexity {np.exp(-values[following].mean()):.3f}")
    divergence = (np.exp(exact) * (exact - quick)).sum(axis=1).mean()
    same = (exact.argmax(axis=1) == quick.argmax(axis=1)).mean()
    print(f"{name}: KL {divergence:.5f} nats a token, same likeliest token {same:.1%}")


if __name__ == "__main__":
    main()
