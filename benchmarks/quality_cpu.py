"""What 8-bit activations and a quantized cache cost, for every weight format.

    python -m benchmarks.quality_cpu [--tokens 2048] [--only TEXT] [--peers FOLDER] [--json FILE]

The text is English that every Python ships (`pydoc_data.topics`). SmolLM2's weights are quantized
anew to each format; then the cpu backend as users run it (int8 activations, float16 cache) is
compared with the same weights, float32 activations and a float32 cache. Wanted: a perplexity
within 0.5 %. The K types need llama.cpp's library (see cpu_vs_llamacpp.py) to make the weights;
their rows of 576 are no whole blocks of 256, so most matrices get the types that llama.cpp falls
back to. Gemma 3's own file has K types in full.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from benchmarks.harness.llamacpp import PeerMissing
from benchmarks.harness.machine import print_heading
from benchmarks.harness.requantize import (
    FALLBACK,
    MLX,
    PLAIN,
    Quantizer,
    gguf_type,
    half,
    mlx_packing,
    requantized,
)
from benchmarks.harness.table import Goal, markdown, verdict, write_json
from localllm import hub
from localllm.backend.cpu import CpuBackend
from localllm.backend.cpu_weights import pack
from localllm.backend.protocol import Batch, Chunk
from localllm.checkpoint import open_checkpoint
from localllm.kernels_cpu import _native
from localllm.models import load_spec, load_weights
from localllm.spec import DecoderSpec
from localllm.tokenizer import load_tokenizer

CHUNK, BLOCK = 256, 32
LIMIT = Goal(0.005, below=True)
SMOLLM2, GEMMA = "smollm2:135m", "gemma3:270m"


@dataclass(frozen=True)
class Row:
    """kl: nats a token. same: share of rows with the same likeliest token.

    change: of the perplexity; error: its standard error over this text.
    """

    model: str
    weights: str
    cache_bits: int
    exact: float
    quick: float
    change: float
    error: float
    kl: float
    same: float


@dataclass(frozen=True)
class Packed:
    """Packed weights that several backends share."""

    spec: DecoderSpec
    store: _native.WeightStore

    def logprobs(self, ids: np.ndarray, *, exact: bool, kv_bits: int) -> Iterator[np.ndarray]:
        """float64 [rows, V]: log-probabilities after each token, chunk by chunk."""
        blocks = -(-len(ids) // BLOCK)
        backend = CpuBackend(
            self.spec,
            (),
            num_blocks=blocks,
            block_size=BLOCK,
            kv_bits=kv_bits,
            float_activations=exact,
            cache=_Kept(self.store),  # type: ignore[arg-type]
        )
        table = np.arange(blocks, dtype=np.int32)
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            chunk = Chunk(part, start, table, tuple(range(len(part))), len(ids))
            logits = backend.forward(Batch((chunk,))).astype(np.float64)
            yield logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        backend.close()


class _Kept:
    """Stands where a cache of packed weights would, and has them at hand."""

    def __init__(self, store: _native.WeightStore) -> None:
        self._store = store

    def store(self, spec: DecoderSpec, pack: object) -> _native.WeightStore:
        return self._store


def text_ids(path: Path, count: int) -> np.ndarray:
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    text = "\n".join(topics[key] for key in sorted(topics))[: 8 * count]
    return np.array(tokenizer.encode(text)[:count], np.int32)


def compare(packed: Packed, ids: np.ndarray, name: str, weights: str, kv_bits: int) -> Row:
    pairs = zip(
        packed.logprobs(ids, exact=True, kv_bits=32),
        packed.logprobs(ids, exact=False, kv_bits=kv_bits),
        strict=True,
    )
    losses: list[np.ndarray] = []  # [2, rows] each
    divergence, same, at = 0.0, 0, 0
    for exact, quick in pairs:
        following = ids[at + 1 : at + 1 + len(exact)]
        rows = np.arange(len(following))
        losses.append(-np.stack((exact[rows, following], quick[rows, following])))
        divergence += float((np.exp(exact) * (exact - quick)).sum())
        same += int((exact.argmax(axis=1) == quick.argmax(axis=1)).sum())
        at += len(exact)
    both, count = np.concatenate(losses, axis=1), len(ids)
    before, after = np.exp(both.mean(axis=1)).tolist()
    return Row(
        name,
        weights,
        kv_bits,
        before,
        after,
        change=after / before - 1,
        error=float((both[1] - both[0]).std() / both.shape[1] ** 0.5),
        kl=divergence / count,
        same=same / count,
    )


def formats() -> Iterator[tuple[str, Quantizer | None]]:
    """Label and quantizer of each format SmolLM2 is tried in; None leaves the file's own."""
    yield "its own file (Q4_1)", None
    yield "F16", half
    for kind in PLAIN:
        yield kind, gguf_type(kind)
    for kind in FALLBACK:
        try:
            yield f"{kind}, else {FALLBACK[kind]}", gguf_type(kind)
        except PeerMissing as error:
            print(f"{kind}: not measured: {error}")
    for bits, group in MLX:
        yield f"MLX {bits} bits, groups of {group}", mlx_packing(bits, group)


def load(name: str, quantize: Quantizer | None) -> Packed:
    checkpoint = open_checkpoint(hub.resolve(name).path)
    spec = load_spec(checkpoint)
    weights = load_weights(checkpoint, spec)
    return Packed(spec, pack(spec, requantized(weights, quantize) if quantize else weights))


def rows(args: argparse.Namespace) -> Iterator[Row]:
    works = [(SMOLLM2, label, quantize) for label, quantize in formats()]
    works += [(GEMMA, "its own file (Q4_K_M)", None)]
    works += [
        (GEMMA, f"MLX {bits} bits, groups of {group}", mlx_packing(bits, group))
        for bits, group in MLX
        if group == 128
    ]
    for name, label, quantize in works:
        if args.only and args.only.lower() not in f"{name} {label}".lower():
            continue
        ids = text_ids(hub.resolve(name).path, args.tokens)
        packed = load(name, quantize)
        for kv_bits in (16, 8, 4) if quantize is None else (16,):
            row = compare(packed, ids, name, label, kv_bits)
            print(f"… {name}, {label}, cache {kv_bits} bits: {row.change:+.2%}", flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of text, in one window")
    parser.add_argument("--only", help="only the rows whose model or format has this text")
    parser.add_argument("--peers", type=Path, help="see LOCALLLM_PEERS")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.peers:
        os.environ["LOCALLLM_PEERS"] = str(args.peers)
    print_heading()
    found = list(rows(args))
    header = (
        *("model", "weights", "cache", "float32", "int8", "change"),
        *("wanted", "reached", "KL a token", "same likeliest"),
    )
    shown = [
        [
            row.model,
            row.weights,
            f"{row.cache_bits} bits",
            f"{row.exact:.3f}",
            f"{row.quick:.3f}",
            f"{row.change:+.2%} ({row.error:.2%})",
            "-" if row.cache_bits < 16 else "within 0.5 %",
            verdict(abs(row.change), LIMIT if row.cache_bits == 16 else None),
            f"{row.kl:.1e}",
            f"{row.same:.1%}",
        ]
        for row in found
    ]
    print(f"\nperplexity over {args.tokens} tokens, one window; in brackets the standard error\n")
    print(markdown(header, shown))
    write_json(args.json, found, tokens=args.tokens)


if __name__ == "__main__":
    main()
