"""What layers of the `metal` backend are built from, by the names of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import mlx.core as mx

from localllm.backend.metal_ops import Linear, Norm
from localllm.backend.metal_weights import Matrix
from localllm.spec import NormSpec

Weights = Mapping[str, mx.array | Matrix]


class Adapt(Protocol):
    """What the adapters of a step add. targets: "attn.q", "ffn.up" …"""

    def __call__(self, layer: int, target: str, x: mx.array, y: mx.array) -> mx.array:
        """y with what is added. x: [n, in]; y: [n, out] = W x."""
        ...

    def touches(self, layer: int, *targets: str) -> bool:
        """Whether anything is added to one of them."""
        ...


def adapted(adapt: Adapt | None, layer: int, target: str, x: mx.array, y: mx.array) -> mx.array:
    return y if adapt is None else adapt(layer, target, x, y)


def vector_of(weights: Weights, name: str) -> mx.array:
    part = weights[name]
    assert isinstance(part, mx.array), f"{name} is no vector"
    return part


def matrix_of(weights: Weights, name: str) -> Matrix:
    part = weights[name]
    assert not isinstance(part, mx.array), f"{name} is no matrix"
    return part


def linear_of(weights: Weights, name: str, bias: bool) -> Linear:
    weight = matrix_of(weights, f"{name}.weight")
    return Linear(weight, vector_of(weights, f"{name}.bias") if bias else None)


def norm_of(weights: Weights, name: str, spec: NormSpec) -> Norm:
    bias = vector_of(weights, f"{name}.bias") if spec.bias else None
    return Norm(spec, vector_of(weights, f"{name}.weight"), bias)
