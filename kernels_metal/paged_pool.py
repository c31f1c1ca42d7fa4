"""A layer's pool of KV blocks as the paged attention kernels take it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx

# The first inputs of both kernels.
QUERIES_AND_POOLS = (
    "q", "keys", "key_scales", "key_biases", "values", "value_scales", "value_biases"
)  # fmt: skip
NO_WINDOW = 2**31 - 1
NO_SINK = -1e38  # weighs nothing beside any real score, and stays finite in powers of two


@dataclass(frozen=True)
class QuantizedPool:
    """Keys or values of one layer, affine: value = scale * code + bias, per group of a head.

    codes: uint32 [blocks, kv_heads, block_size, head_dim * bits / 32], the first code in the lowest
    bits. scales, biases: T [blocks, kv_heads, block_size, head_dim / group]. bits: 8 or 4.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    bits: int


Pool = mx.array | QuantizedPool  # an array is T [blocks, kv_heads, block_size, head_dim]


def group_size(head_dim: int) -> int:
    """How many elements of a head share a scale and a bias."""
    return 32 if head_dim % 32 == 0 else 16


def bits_of(pool: Pool) -> int:
    """8 or 4; 0 where the pool holds the values themselves."""
    return pool.bits if isinstance(pool, QuantizedPool) else 0


def pool_shape(pool: Pool) -> tuple[int, int, int]:
    """Blocks, KV heads, positions in a block."""
    array = pool.codes if isinstance(pool, QuantizedPool) else pool
    return array.shape[0], array.shape[1], array.shape[2]


def pool_inputs(pool: Pool) -> list[mx.array]:
    """Codes, scales, biases as kernels take them; an unquantized pool fills all three places."""
    if isinstance(pool, QuantizedPool):
        return [pool.codes, pool.scales, pool.biases]
    return [pool, pool, pool]


def position_bytes(head_dim: int, bits: int, itemsize: int) -> int:
    """Bytes of one position's key (or value) of one KV head. itemsize: of T."""
    if not bits:
        return head_dim * itemsize
    return head_dim * bits // 8 + 2 * itemsize * (head_dim // group_size(head_dim))


@lru_cache(maxsize=64)
def no_sinks(heads: int) -> mx.array:
    return mx.array([NO_SINK] * heads, dtype=mx.float32)


@lru_cache(maxsize=256)
def score_settings(scale: float, softcap: float | None) -> mx.array:
    return mx.array([scale, softcap or 0.0], dtype=mx.float32)


@lru_cache(maxsize=64)
def window_setting(window: int | None) -> mx.array:
    return mx.array([window or NO_WINDOW], dtype=mx.int32)


@dataclass(frozen=True)
class Heads:
    """How query heads share the reads of a KV head: `share` of its `group` query heads at a time,
    in `parts` threadgroups."""

    group: int
    share: int

    @property
    def parts(self) -> int:
        return -(-self.group // self.share)


def shared_heads(heads: int, kv_heads: int, most: int) -> Heads:
    """The query heads of a KV head in equal parts of at most `most`."""
    group = heads // kv_heads
    parts = -(-group // most)
    return Heads(group, -(-group // parts))


def check_call(q: mx.array, keys: Pool, values: Pool, sinks: mx.array | None) -> None:
    """Asserts what both kernels ask of their arguments."""
    _, heads, head_dim = q.shape
    assert head_dim % 16 == 0, head_dim
    assert 16 <= head_dim <= 256, head_dim
    assert q.dtype in (mx.float16, mx.bfloat16, mx.float32), q.dtype
    assert pool_shape(keys) == pool_shape(values), (pool_shape(keys), pool_shape(values))
    assert bits_of(keys) == bits_of(values), (bits_of(keys), bits_of(values))
    assert heads % pool_shape(keys)[1] == 0, (heads, pool_shape(keys))
    if sinks is not None:
        check_array(sinks, (heads,), mx.float32)
    for pool in (keys, values):
        if isinstance(pool, QuantizedPool):
            assert pool.bits in (4, 8), pool.bits
            check_array(pool.codes, (*pool_shape(pool), head_dim * pool.bits // 32), mx.uint32)
            groups = (*pool_shape(pool), head_dim // group_size(head_dim))
            check_array(pool.scales, groups, q.dtype)
            check_array(pool.biases, groups, q.dtype)
        else:
            check_array(pool, (*pool_shape(pool), head_dim), q.dtype)


def check_array(array: mx.array, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    assert array.shape == shape, (array.shape, shape)
    assert array.dtype == dtype, (array.dtype, dtype)
