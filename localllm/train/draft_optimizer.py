"""What a draft head is trained with: Muon for matrices, Adam for the gains of norms.

Muon (Jordan et al., 2024): the momentum of a matrix, with all singular values brought near 1 by
five Newton-Schulz steps; scaled as Liu et al. do (arXiv:2502.16982), so that its rate is one that
Adam would have. It needs about half of Adam's steps here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Executor
from functools import partial

import numpy as np

from localllm.train.draft_network import Arrays

_MOMENTUM = np.float32(0.95)
_BETAS = (0.9, 0.98)
_STEPS, _A, _B, _C = 5, 3.4445, -4.7750, 2.0315


class Optimizer:
    """Changes `weights` in place. The rate is warmed up over a twentieth of `total` steps, then a
    cosine to 0. Matrices decay by `decay` times the rate."""

    def __init__(self, weights: Arrays, rate: float, total: int, decay: float) -> None:
        self._weights = weights
        self._rate, self._total, self._decay = rate, total, decay
        self._state = {f"{name}.m": np.zeros_like(array) for name, array in weights.items()}
        self._state |= {
            f"{name}.v": np.zeros_like(array) for name, array in weights.items() if array.ndim < 2
        }

    def update(self, gradients: Arrays, step: int, pool: Executor | None = None) -> None:
        """pool: whose threads take a weight each."""
        one = partial(self._update, step=step, rate=self._at(step))
        names = sorted(self._weights, key=lambda name: -self._weights[name].size)
        for _ in (pool.map if pool else map)(one, names, [gradients[name] for name in names]):
            pass

    def _update(self, name: str, gradient: np.ndarray, *, step: int, rate: float) -> None:
        weight, momentum = self._weights[name], self._state[f"{name}.m"]
        if weight.ndim > 1:
            momentum *= _MOMENTUM
            momentum += gradient
            change = orthogonal(gradient + _MOMENTUM * momentum)
            weight *= np.float32(1 - rate * self._decay)
            weight -= np.float32(rate * 0.2 * math.sqrt(max(weight.shape))) * change
            return
        squares = self._state[f"{name}.v"]
        momentum += np.float32(1 - _BETAS[0]) * (gradient - momentum)
        squares += np.float32(1 - _BETAS[1]) * (gradient * gradient - squares)
        scale = math.sqrt(1 - _BETAS[1] ** (step + 1)) / (1 - _BETAS[0] ** (step + 1))
        weight -= np.float32(rate * scale) * momentum / (np.sqrt(squares) + np.float32(1e-8))

    def _at(self, step: int) -> float:
        warm = max(1, self._total // 20)
        if step < warm:
            return self._rate * (step + 1) / warm
        return self._rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (self._total - warm)))

    def arrays(self) -> Arrays:
        """Copies of weights and state, for a checkpoint that is written while training goes on."""
        return {name: array.copy() for name, array in (self._weights | self._state).items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, array in (self._weights | self._state).items():
            array[...] = arrays[name]


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """float32 [m, n]: the same singular vectors, singular values between about 0.7 and 1.2."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (np.linalg.norm(wide) + np.float32(1e-7))
    for _ in range(_STEPS):
        square = x @ x.T
        x = np.float32(_A) * x + (np.float32(_B) * square + np.float32(_C) * (square @ square)) @ x
    result: np.ndarray = x if wide is matrix else x.T
    return result
