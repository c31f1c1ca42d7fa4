"""What the modules of the reference decoder are made of: weights by name, norms, activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from localllm.backend.reference_linear import Linear, Matrix, Part
from localllm.spec import NormSpec
from localllm.spec.decoder import Activation


class Routed(NamedTuple):
    """Which of a mixture's experts is at work, and on which of the step's rows, int [n] rising."""

    expert: int
    rows: np.ndarray


class Adapt(Protocol):
    def __call__(
        self, target: str, x: mx.array, y: mx.array, routed: Routed | None = None
    ) -> mx.array:
        """y [n, out] = W x, with what adapters add; x: [n, in].

        target: "attn.q", and at the decoder "layers.0.attn.q" … routed: None where x has all rows.
        """
        ...


Weight = mx.array | Matrix | list[Matrix]  # a vector, a matrix, or one matrix per expert


class Weights:
    """Weights by name, with a prefix that descends into the tree."""

    def __init__(self, parts: Mapping[str, Weight], at: str = "") -> None:
        self._parts = parts
        self._at = at

    def under(self, name: str) -> Weights:
        return Weights(self._parts, f"{self._at}{name}.")

    def vector(self, name: str) -> mx.array:
        part = self._parts[self._at + name]
        assert isinstance(part, mx.array), f"{self._at}{name} is no vector"
        return part

    def matrix(self, name: str) -> Matrix:
        part = self._parts[self._at + name]
        assert not isinstance(part, mx.array | list), f"{self._at}{name} is no matrix"
        return part

    def linear(self, name: str, bias: bool = False) -> Linear:
        return Linear(self.matrix(f"{name}.weight"), self.vector(f"{name}.bias") if bias else None)

    def experts(self, name: str, bias: bool = False) -> list[Linear]:
        part = self._parts[f"{self._at}{name}.weight"]
        assert isinstance(part, list), f"{self._at}{name} holds no experts"
        if not bias:
            return [Linear(matrix) for matrix in part]
        biases = mx.split(self.vector(f"{name}.bias"), len(part))
        return [Linear(matrix, own) for matrix, own in zip(part, biases, strict=True)]


class Norm(Part):
    """RMSNorm or LayerNorm over the last axis."""

    def __init__(self, spec: NormSpec, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        self.weight = weights.vector("weight")
        self.bias = weights.vector("bias") if spec.bias else None

    def __call__(self, x: mx.array) -> mx.array:
        if self.spec.kind == "layer":
            x = x - mx.mean(x, axis=-1, keepdims=True)
        variance = mx.mean(mx.square(x), axis=-1, keepdims=True)
        y = x * mx.rsqrt(variance + self.spec.eps) * (self.weight + self.spec.offset)
        return y if self.bias is None else y + self.bias


def activate(x: mx.array, kind: Activation) -> mx.array:
    if kind == "silu":
        return x * mx.sigmoid(x)
    if kind == "gelu":
        return 0.5 * x * (1 + mx.erf(x * math.sqrt(0.5)))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    assert kind == "relu", f"unknown activation {kind}"
    return mx.maximum(x, 0)
