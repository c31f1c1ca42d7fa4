"""Paged attention with MLX's own ops: gather a sequence's blocks, then attend to the copy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.paged_cases import PagedKV, normal, paged_kv
from localllm.kernels_metal.paged_pool import Pool, QuantizedPool, group_size, position_bytes

# Of the largest value: twice what rounding the result to the dtype costs at most; float32 results
# also have the sums and exponentials of thousands of terms.
TOLERANCE = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7, mx.float32: 2e-5}
BLOCK = 32  # positions, as in the product


@dataclass(frozen=True)
class Shape:
    """A layer of a known model at work. starts: positions before each sequence's rows."""

    model: str
    heads: int
    kv_heads: int
    head_dim: int
    starts: tuple[int, ...]
    rows: int = 1  # of each sequence
    bits: int = 0
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def work(self, dtype: mx.Dtype) -> str:
        """The entry of the dispatch table."""
        store = f"{self.bits}-bit KV" if self.bits else "KV"
        seen = max(self.starts) + self.rows
        what = f"{store}, {self.heads}/{self.kv_heads} heads of {self.head_dim}"
        what += f", {len(self.starts)} x {self.rows} rows, {seen} positions"
        if self.window:
            what += f", window {self.window}"
        if self.softcap:
            what += ", softcap"
        if self.sinks:
            what += ", sinks"
        return f"{what}, {str(dtype).rsplit('.', 1)[-1]}"

    @property
    def lengths(self) -> list[int]:
        """Positions of each sequence, its rows' own among them."""
        return [start + self.rows for start in self.starts]

    @property
    def seen_from(self) -> list[int]:
        """The first position that any row of each sequence sees."""
        return [max(0, s + 1 - self.window) if self.window else 0 for s in self.starts]

    def kv(self, dtype: mx.Dtype) -> PagedKV:
        return paged_kv(
            np.random.default_rng(sum(self.lengths)), self.lengths, kv_heads=self.kv_heads,
            head_dim=self.head_dim, block_size=BLOCK, bits=self.bits, dtype=dtype,
            seen_from=self.seen_from,
        )  # fmt: skip

    def queries(self, dtype: mx.Dtype) -> mx.array:
        rows = self.rows * len(self.starts)
        return normal(np.random.default_rng(rows), (rows, self.heads, self.head_dim), dtype)

    def sink_logits(self) -> mx.array | None:
        if not self.sinks:
            return None
        return normal(np.random.default_rng(1), (self.heads,), mx.float32)

    def least_bytes(self, dtype: mx.Dtype) -> int:
        """KV that is seen, once; queries and results; block ids of it; a length per sequence."""
        seen = sum(self.lengths) - sum(self.seen_from)
        kv = 2 * seen * self.kv_heads * position_bytes(self.head_dim, self.bits, dtype.size)
        vectors = 2 * self.rows * len(self.starts) * self.heads * self.head_dim * dtype.size
        ids = sum(
            -(-length // BLOCK) - first // BLOCK
            for length, first in zip(self.lengths, self.seen_from, strict=True)
        )
        return kv + vectors + 4 * ids + 4 * len(self.starts)

    @property
    def in_mlx(self) -> bool:
        """Whether MLX can: its attention has no softcap, its dequantization no groups of 16."""
        return self.softcap is None and (not self.bits or group_size(self.head_dim) == 32)


def gathered(pool: Pool, tables: mx.array) -> mx.array:
    """[sequences, kv_heads, max_blocks * block_size, head_dim], dequantized."""
    if isinstance(pool, QuantizedPool):
        return mx.dequantize(
            gathered(pool.codes, tables), gathered(pool.scales, tables),
            gathered(pool.biases, tables), group_size=32, bits=pool.bits,
        )  # fmt: skip
    blocks = mx.take(pool, tables, axis=0)  # [n, max_blocks, kv_heads, block_size, width]
    return blocks.swapaxes(1, 2).flatten(2, 3)


def mlx_attention(shape: Shape, q: mx.array, kv: PagedKV) -> mx.array:
    """[rows of all sequences, heads, head_dim]; every sequence has the same count of rows."""
    sequences, rows = len(shape.starts), shape.rows
    tables = mx.maximum(mx.array(kv.tables), 0)
    width = max(shape.lengths)
    keys, values = (gathered(pool, tables)[:, :, :width] for pool in (kv.keys, kv.values))
    mask: mx.array | str | None = None
    if shape.window is not None or len(set(shape.lengths)) > 1:
        last = mx.array(shape.starts)[:, None] + mx.arange(rows)  # [sequences, rows]
        ahead = mx.arange(width) - last[:, None, :, None]
        mask = ahead <= 0
        if shape.window is not None:
            mask &= ahead > -shape.window
    elif rows > 1:
        mask = "causal"
    sinks = shape.sink_logits()
    out = mx.fast.scaled_dot_product_attention(
        q.reshape(sequences, rows, shape.heads, shape.head_dim).swapaxes(1, 2),
        keys, values, scale=shape.head_dim**-0.5, mask=mask,
        sinks=None if sinks is None else sinks.astype(q.dtype),
    )  # fmt: skip
    return out.swapaxes(1, 2).reshape(q.shape)


@cache
def decode_shapes() -> tuple[Shape, ...]:
    llama = ("Llama 3.2 1B", 32, 8, 64)
    qwen = ("Qwen3 8B", 32, 8, 128)
    uneven = tuple(range(100, 1700, 200))
    return (
        Shape("SmolLM2 135M", 9, 3, 64, (255,)),
        Shape("SmolLM2 135M", 9, 3, 64, uneven),
        Shape(*llama, (1023,)),
        Shape(*llama, uneven),
        Shape(*qwen, (4095,)),
        Shape(*qwen, (4095,), bits=8),
        Shape(*qwen, (4095,), bits=4),
        Shape(*qwen, uneven, bits=8),
        Shape(*qwen, (1020,), rows=4),  # verifying 3 drafted tokens
        Shape(*qwen, uneven, rows=4),
        Shape("Gemma 3 1B", 4, 1, 256, (2047,), window=512),
        Shape("gpt-oss 20B", 64, 8, 64, (2047,), sinks=True),
        Shape("gpt-oss 20B", 64, 8, 64, (2047,), window=128, sinks=True),
        Shape("Gemma 2 2B", 8, 4, 256, (1023,), softcap=50.0),
        Shape("Phi-2", 32, 32, 80, (511,)),
        Shape("Phi-3 mini", 32, 32, 96, (511,)),
    )


@cache
def prefill_shapes() -> tuple[Shape, ...]:
    qwen = ("Qwen3 0.6B", 16, 8, 128)
    return (
        Shape("SmolLM2 135M", 9, 3, 64, (0,), 256),
        Shape("Llama 3.2 1B", 32, 8, 64, (128,), 64),
        Shape(*qwen, (0,), 128),
        Shape(*qwen, (0, 0), 64),
        Shape(*qwen, (448,), 64),
        Shape(*qwen, (448,), 64, bits=8),
        Shape(*qwen, (448,), 64, bits=4),
        Shape("Gemma 3 270M", 4, 1, 256, (600,), 128, window=512),
        Shape("gpt-oss 20B", 64, 8, 64, (128,), 32, window=128, sinks=True),
        Shape("Gemma 2 2B", 8, 4, 256, (0,), 64, softcap=50.0),
        Shape("Phi-2", 32, 32, 80, (0,), 64),
    )
