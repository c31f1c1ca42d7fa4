"""Adapters into the native engine's packed form."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from localllm.adapters.lora import EXPERTS, LINEARS, LoraAdapter, LowRank
from localllm.backend.cpu_weights import row_orders
from localllm.checkpoint.tensor import Dense
from localllm.kernels_cpu import _native
from localllm.spec import DecoderSpec

# Where the native engine's name of a linear is not the end of ours.
_TARGETS = {
    "attn.gate": "head_gate",
    "delta.qkv": "in",
    "delta.z": "z",
    "delta.o": "out",
    "conv.in": "in",
    "conv.out": "out",
}


def packed_bytes(adapter: LoraAdapter) -> int:
    """What `pack_adapter` takes."""
    return _matrix_bytes(adapter) + sum(
        pair.gains.values.nbytes for pair in adapter.targets.values() if pair.gains is not None
    )


def _matrix_bytes(adapter: LoraAdapter) -> int:
    return sum(
        int(_native.adapter_pair_bytes(a, b))
        for pair in adapter.targets.values()
        for a, b in _matrices(pair)
    )


def pack_adapter(spec: DecoderSpec, adapter: LoraAdapter) -> _native.Adapter:
    """For weights as `pack` packs them; matrices of 16 bits stay so, and no value changes.

    The adapter has passed `check_adapter`. Raises MemoryError.
    """
    orders = dict(row_orders(spec))
    packed = _native.Adapter(len(spec.layers), _matrix_bytes(adapter))
    # In the order of their use, which is the order in which memory is read fastest.
    for target in sorted(adapter.targets, key=_place):
        pair = adapter.targets[target]
        _, layer, stem = target.split(".", 2)
        linear = _TARGETS.get(stem, stem.split(".")[1])
        if stem in EXPERTS:
            for expert, sides in enumerate(_matrices(pair)):
                packed.add(int(layer), _native.Target[linear], *sides, pair.scale, expert=expert)
            continue
        order = orders.get(f"{target}.weight")
        b = pair.b if order is None else pair.b.rows(order)
        gains = None if pair.gains is None else pair.gains.values  # biases come after them here
        if gains is not None and order is not None:
            gains = gains[order]
        packed.add(int(layer), _native.Target[linear], _array(pair.a), _array(b), pair.scale, gains)
    return packed


def _place(target: str) -> tuple[int, int]:
    _, layer, stem = target.split(".", 2)
    return int(layer), (*LINEARS, *EXPERTS).index(stem)


def _matrices(pair: LowRank) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A [r, in] and B [out, r], of experts those of one after the other."""
    if len(pair.a.shape) == 2:
        yield _array(pair.a), _array(pair.b)
    else:
        yield from zip(_array(pair.a), _array(pair.b), strict=True)


def _array(matrix: Dense) -> np.ndarray:
    return np.ascontiguousarray(matrix.data)
