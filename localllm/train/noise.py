"""Dropout masks and embedding noise by `Noise`'s hash, in MLX: the same bits in every program."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from localllm.train.program import Noise

_EMBEDDINGS = 0xFFFFFFFF


def dropout_mask(noise: Noise, target: int, rows: np.ndarray, columns: int) -> mx.array:
    """bool [n, columns], what is kept of target number `target`'s input; rows: uint32 [n]."""
    kept: mx.array = _hash(noise.seed, target, rows, columns) >= math.ceil(noise.dropout * 2**32)
    return kept


def embedding_noise(noise: Noise, rows: np.ndarray, lengths: np.ndarray, hidden: int) -> mx.array:
    """float32 [n, hidden], what NEFTune adds; lengths: of each row's sequence, int [n]."""
    unit = _hash(noise.seed, _EMBEDDINGS, rows, hidden).astype(mx.float32) * 2.0**-31 - 1
    sizes = noise.neftune / np.sqrt(lengths.astype(np.float64) * hidden)
    return unit * mx.array(sizes.astype(np.float32))[:, None]


def _hash(seed: int, target: int, rows: np.ndarray, columns: int) -> mx.array:
    """uint32 [n, columns]."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    start = _mix(mx.array(low, mx.uint32) ^ _mix(mx.array(high ^ target, mx.uint32)))
    row = _mix(start + mx.array(rows.astype(np.uint32)))
    column = mx.arange(columns, dtype=mx.uint32) * mx.array(0x9E3779B9, mx.uint32)
    return _mix(row[:, None] + column)


def _mix(x: mx.array) -> mx.array:
    x = (x ^ (x >> 16)) * mx.array(0x85EBCA6B, mx.uint32)
    x = (x ^ (x >> 13)) * mx.array(0xC2B2AE35, mx.uint32)
    mixed: mx.array = x ^ (x >> 16)
    return mixed
