"""What `qmv` and `qmm_small` must give, and how far off float32 sums may be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from localllm.kernels_metal.affine import Affine, quantized
from localllm.kernels_metal.reference import qmv as reference
from tests.kernels_metal.running import f64

EPSILON = 2.0**-24


def matrix(weight: Affine) -> np.ndarray:
    codes = np.array(weight.codes)
    return reference.dequantized(
        codes, f64(weight.scales), f64(weight.biases), weight.bits, weight.group
    )


def magnitudes(weight: Affine) -> np.ndarray:
    """|scale| * code + |bias|: what is added up where scale * code and bias cancel."""
    codes = np.array(weight.codes)
    scales, biases = np.abs(f64(weight.scales)), np.abs(f64(weight.biases))
    return reference.dequantized(codes, scales, biases, weight.bits, weight.group)


@dataclass(frozen=True)
class Work:
    """Random x [rows, k], gate and up [n, k], with biases and a residual."""

    dtype: mx.Dtype
    bits: int
    group: int
    rows: int
    k: int
    n: int

    def normal(self, *shape: int, seed: int) -> mx.array:
        values = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return mx.array(values).astype(self.dtype)

    def weight(self, seed: int) -> Affine:
        values = self.normal(self.n, self.k, seed=seed) * self.k**-0.5
        return quantized(values, bits=self.bits, group=self.group)

    @cached_property
    def x(self) -> mx.array:
        return self.normal(self.rows, self.k, seed=1)

    @cached_property
    def gate(self) -> Affine:
        return self.weight(2)

    @cached_property
    def up(self) -> Affine:
        return self.weight(3)

    @cached_property
    def bias(self) -> mx.array:
        return self.normal(self.n, seed=4)

    @cached_property
    def up_bias(self) -> mx.array:
        return self.normal(self.n, seed=5)

    @cached_property
    def residual(self) -> mx.array:
        return self.normal(self.rows, self.n, seed=6)

    def sum_error(self, weight: Affine, *added: mx.array) -> np.ndarray:
        """Of float32 sums of K terms and a few more, added in any order."""
        total = np.abs(f64(self.x)) @ magnitudes(weight).T
        for array in added:
            total = total + np.abs(f64(array))
        return (self.k + 4) * EPSILON * total

    def linear(self) -> tuple[np.ndarray, np.ndarray]:
        """x gate^T, and the error allowed before y is rounded."""
        return reference.matmul(f64(self.x), matrix(self.gate)), self.sum_error(self.gate)

    def linear_with_all(self) -> tuple[np.ndarray, np.ndarray]:
        bias, residual = f64(self.bias), f64(self.residual)
        truth = reference.matmul(f64(self.x), matrix(self.gate), bias, residual)
        return truth, self.sum_error(self.gate, self.bias, self.residual)

    def gated(self, activation: str, *, biased: bool) -> tuple[np.ndarray, np.ndarray]:
        x = f64(self.x)
        biases = (f64(self.bias), f64(self.up_bias)) if biased else (0.0, 0.0)
        gate = reference.matmul(x, matrix(self.gate), biases[0])
        up = reference.matmul(x, matrix(self.up), biases[1])
        added = (self.bias, self.up_bias) if biased else ()
        gate_error = self.sum_error(self.gate, *added[:1])
        up_error = self.sum_error(self.up, *added[1:])
        active = reference.activate(gate, activation)
        truth = active * up
        # No activation is steeper than 1.13; it takes a dozen float32 operations, of which the
        # argument of the exponential, up to |gate| or so, is amplified by itself.
        active_error = 1.13 * gate_error + 12 * EPSILON * (1 + np.abs(gate)) * np.abs(gate)
        return truth, active_error * (np.abs(up) + up_error) + np.abs(active) * up_error
