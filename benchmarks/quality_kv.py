"""What a cache of fewer bits costs: perplexity of the cpu backend against itself in float32.

    python benchmarks/quality_kv.py [MODEL]

Activations stay in float32, so that nothing but the cache differs. The text is English that every
Python ships (`pydoc_data.topics`), its first 2,048 tokens. After +- stands the standard error.
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


def losses(path, ids: np.ndarray, kv_bits: int) -> np.ndarray:
    """float64 [T - 1]: the negative log-probability of each next token."""
    checkpoint = open_checkpoint(path)
    spec = load_spec(checkpoint)
    backend = CpuBackend(
        spec,
        load_weights(checkpoint, spec),
        num_blocks=TOKENS // 32,
        kv_bits=kv_bits,
        float_activations=True,
    )
    table = np.arange(TOKENS // 32, dtype=np.int32)
    result = []
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        chunk = Chunk(part, start, table, tuple(range(len(part))), len(ids))
        logits = backend.forward(Batch((chunk,)))
        for row, token in zip(logits, ids[start + 1 : start + CHUNK + 1], strict=False):
            top = row.max()
            result.append(np.log(np.exp(row - top).sum(dtype=np.float64)) + top - row[token])
    backend.close()
    return np.array(result, np.float64)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2:135m"
    path = hub.resolve(name).path
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    text = "\n".join(topics[key] for key in sorted(topics))[: 8 * TOKENS]
    ids = np.array(tokenizer.encode(text)[:TOKENS], np.int32)
    exact = losses(path, ids, 32)
    print(f"{name}: cache of 32 bits: perplexity {np.exp(exact.mean()):.3f}")
    for bits in (16, 8, 4):
        more = losses(path, ids, bits) - exact
        error = more.std() / np.sqrt(len(more))
        print(f"{name}: {bits} bits: {np.expm1(more.mean()):+.2%} +- {error:.2%}", flush=True)


if __name__ == "__main__":
    main()
