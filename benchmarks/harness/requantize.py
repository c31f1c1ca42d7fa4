"""The weights of a model quantized anew, in memory, to any format that we read.

GGUF's plain types come from the `gguf` package, its K types from llama.cpp's own quantizer (through
its library, if it is here), MLX's from `mx.quantize`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from localllm.checkpoint.gguf_blocks import to_affine
from localllm.checkpoint.gguf_types import TYPES, GGMLType
from localllm.checkpoint.tensor import Affine, Dense, GroupValues, Tensor
from scripts.parity.llamacpp_abi import load_ggml_base

Weights = Iterable[tuple[str, Tensor]]
Quantizer = Callable[[np.ndarray], Tensor]

PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# A K type needs rows of whole 256s; other matrices get what llama.cpp gives them, or the nearest.
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
MLX = tuple((bits, group) for bits in (4, 5, 6, 8) for group in (32, 64, 128))


def requantized(weights: Weights, quantize: Quantizer) -> Iterator[tuple[str, Tensor]]:
    """Every matrix through `quantize` from its float32 values; vectors stay."""
    for name, tensor in weights:
        yield name, quantize(tensor.to_float32()) if len(tensor.shape) == 2 else tensor


def half(values: np.ndarray) -> Tensor:
    return Dense(values.astype(np.float16), "float16")


def gguf_type(name: str) -> Quantizer:
    """Raises PeerMissing for a K type where llama.cpp's library is not here."""
    blocks = _k_blocks(name) if name in FALLBACK else _plain_blocks

    def quantize(values: np.ndarray) -> Tensor:
        kind = next(kind for kind in TYPES.values() if kind.name == name)
        if values.shape[1] % kind.block:
            return gguf_type(FALLBACK[name])(values)
        raw = blocks(values, kind)
        return to_affine(kind, values.shape, lambda at, size: raw[at : at + size])

    return quantize


def mlx_packing(bits: int, group: int) -> Quantizer:
    """A matrix whose rows are not whole groups takes the largest group that fits."""
    import mlx.core as mx

    def quantize(values: np.ndarray) -> Tensor:
        fitting = next(size for size in (group, 64, 32) if values.shape[1] % size == 0)
        packed = mx.quantize(mx.array(values).astype(mx.float16), group_size=fitting, bits=bits)
        codes, scales, biases = (np.array(part) for part in packed)
        return Affine(codes, bits, fitting, GroupValues(scales), GroupValues(biases))

    return quantize


def _plain_blocks(values: np.ndarray, kind: GGMLType) -> bytes:
    import gguf

    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.name]).tobytes()


def _k_blocks(name: str) -> Callable[[np.ndarray, GGMLType], bytes]:
    import gguf

    number = int(gguf.GGMLQuantizationType[name])
    library = load_ggml_base()

    def blocks(values: np.ndarray, kind: GGMLType) -> bytes:
        values = np.ascontiguousarray(values, np.float32)
        out = ctypes.create_string_buffer(values.size // kind.block * kind.nbytes)
        rows, columns = values.shape
        library.ggml_quantize_chunk(number, values.ctypes.data, out, 0, rows, columns, None)
        return out.raw

    return blocks
