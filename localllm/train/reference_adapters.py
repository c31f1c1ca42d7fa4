"""Low-rank adapters under differentiation: LoRA and DoRA, with dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from localllm.backend.reference_linear import Linear
from localllm.train.noise import dropout_mask
from localllm.train.program import Layout, Noise


class Adapters:
    """Adds B A x to the outputs of a layer's linears; with DoRA scales their rows.

    norms: by target with DoRA, each row's squared length in W, float32 [out].
    """

    def __init__(self, layout: Layout, norms: Mapping[str, mx.array]) -> None:
        self._scales = layout.scales
        self._numbers = {target: number for number, target in enumerate(layout.targets)}
        self._norms = norms

    def apply(
        self,
        target: str,
        linear: Linear,
        x: mx.array,
        y: mx.array,
        arrays: Mapping[str, mx.array],
        rows: np.ndarray,
        noise: Noise | None,
    ) -> mx.array:
        """x float32 [n, in], y float32 [n, out] = W x + bias -> the adapted output.

        rows: uint32 [n], counted from the step's first.
        """
        if f"{target}.a" not in arrays:
            return y
        a, b = arrays[f"{target}.a"], arrays[f"{target}.b"]
        scale = self._scales[target]
        if noise is not None and noise.dropout:
            mask = dropout_mask(noise, self._numbers[target], rows, x.shape[1])
            x = mx.where(mask, x * float(np.float32(1 / (1 - noise.dropout))), 0)
        added = ((x @ a.T) @ b.T) * scale
        if f"{target}.magnitude" not in arrays:
            return y + added
        gain = arrays[f"{target}.magnitude"] / self._length(target, linear, a, b, scale)
        # PEFT's sum: where a gain is 1 and B zero, nothing changes by a bit.
        plain = y if linear.bias is None else y - linear.bias
        return y + ((gain - 1) * plain + gain * added)

    def apply_to_expert(
        self,
        target: str,
        expert: int,
        x: mx.array,
        y: mx.array,
        pairs: Mapping[str, Sequence[mx.array]],
    ) -> mx.array:
        """x float32 [n, in], y float32 [n, out] -> the adapted output of one of the experts.

        pairs: "{target}.a" and "{target}.b" of every expert, [r, in] and [out, r].
        """
        if f"{target}.a" not in pairs:
            return y
        a, b = pairs[f"{target}.a"][expert], pairs[f"{target}.b"][expert]
        return y + ((x @ a.T) @ b.T) * self._scales[target]

    def _length(
        self, target: str, linear: Linear, a: mx.array, b: mx.array, scale: float
    ) -> mx.array:
        """float32 [out]: of the rows of W + scale B A, constant to autodiff as the paper has it.

        |w + s b A|^2 = |w|^2 + 2 s (W A^T b) + s^2 (b A A^T b): without the sum of [out, in].
        """
        a, b = mx.stop_gradient(a), mx.stop_gradient(b)
        cross = mx.sum(linear.matrix.matmul(a).T * b, axis=1)
        own = mx.sum((b @ (a @ a.T)) * b, axis=1)
        squared = self._norms[target] + 2 * scale * cross + scale * scale * own
        return mx.stop_gradient(mx.sqrt(mx.maximum(squared, 1e-30)))
