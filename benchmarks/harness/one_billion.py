"""A model of Llama-3.2-1B's shapes with random 4-bit weights, written once into a cache folder.

Speed does not depend on the values, only on shapes and formats; real weights of this size are not
at hand everywhere. The file has no vocabulary: both sides take token ids.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY = 2048, 16, 32, 8, 8192, 128_256
HEAD = HIDDEN // HEADS
KINDS = ("Q4_0", "Q4_1")
_GROUP = 32
_CHUNK = 4096  # rows made at a time


def cache_folder() -> Path:
    """Where files made for benchmarks are kept; LOCALLLM_BENCH_CACHE names another place."""
    default = Path.home() / ".cache" / "localllm" / "benchmarks"
    return Path(os.environ.get("LOCALLLM_BENCH_CACHE", default))


def one_billion(kind: str) -> Path:
    """The file of this GGUF type, written if it is not there: 0.7 GB for Q4_0, 0.8 GB for Q4_1."""
    path = cache_folder() / f"llama-1b-shapes-{kind}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        print(f"writing {path} …", flush=True)
        _write(part, kind)
        part.replace(path)
    return path


def _write(path: Path, kind: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(1)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, rows, columns in _matrices():
        writer.add_tensor(name, _blocks(random, kind, rows, columns), raw_dtype=quantization)
    for name in _norms():
        writer.add_tensor(name, np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _matrices() -> list[tuple[str, int, int]]:
    """name, rows, columns; the head is the embedding."""
    found = [("token_embd.weight", VOCABULARY, HIDDEN)]
    for n in range(LAYERS):
        found += [
            (f"blk.{n}.attn_q.weight", HIDDEN, HIDDEN),
            (f"blk.{n}.attn_k.weight", KV_HEADS * HEAD, HIDDEN),
            (f"blk.{n}.attn_v.weight", KV_HEADS * HEAD, HIDDEN),
            (f"blk.{n}.attn_output.weight", HIDDEN, HIDDEN),
            (f"blk.{n}.ffn_gate.weight", FEED_FORWARD, HIDDEN),
            (f"blk.{n}.ffn_up.weight", FEED_FORWARD, HIDDEN),
            (f"blk.{n}.ffn_down.weight", HIDDEN, FEED_FORWARD),
        ]
    return found


def _norms() -> list[str]:
    return [
        "output_norm.weight",
        *(f"blk.{n}.{part}_norm.weight" for n in range(LAYERS) for part in ("attn", "ffn")),
    ]


def _blocks(random: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, bytes of a row]: random codes, scales that keep activations near one."""
    scale = np.float16(1 / (5 * columns**0.5))  # codes are uniform in 16 steps, about 5 x this
    floats = [scale] if kind == "Q4_0" else [scale, np.float16(-7.5 * scale)]
    head = np.array(floats, np.float16).view(np.uint8)
    groups = columns // _GROUP
    blocks = np.empty((rows, groups, len(head) + _GROUP // 2), np.uint8)
    blocks[..., : len(head)] = head
    for at in range(0, rows, _CHUNK):
        part = blocks[at : at + _CHUNK, :, len(head) :]
        part[...] = random.integers(0, 256, part.shape, np.uint8)
    return blocks.reshape(rows, -1)
