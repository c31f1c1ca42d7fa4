"""AdamW (https://arxiv.org/abs/1711.05101), in the native module where it is there: same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

import numpy as np

from localllm.train.optimizers.protocol import Piece, checked_state, merged

_CHUNK = 1 << 15  # entries taken at a time: temporaries stay in the cache


class AdamW:
    """m, v: running means of the gradient and of its square, float32 [size]."""

    name = "adamw"

    def __init__(
        self,
        pieces: Sequence[Piece],
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._beta1, self._beta2, self._eps, self._decay = beta1, beta2, eps, weight_decay
        self._adamw = fastest_adamw()
        self._begin(pieces)

    def _begin(self, pieces: Sequence[Piece]) -> None:
        """With running means of zero."""
        self._pieces = merged(pieces)
        size = self._pieces[-1].at.stop if self._pieces else 0
        self._m = np.zeros(size, np.float32)
        self._v = np.zeros(size, np.float32)

    def state(self) -> dict[str, np.ndarray]:
        return {"m": self._m, "v": self._v}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        for name, array in checked_state(self.state(), state):
            array[...] = state[name]

    def update(
        self, parameters: np.ndarray, gradient: np.ndarray, learning_rate: float, step: int
    ) -> None:
        assert step >= 1, "steps count from 1"
        for piece in self._pieces:
            at = piece.at
            self._step(
                piece, parameters[at], gradient[at], self._m[at], self._v[at], learning_rate, step
            )

    def _step(
        self,
        piece: Piece,
        parameters: np.ndarray,
        gradient: np.ndarray,
        m: np.ndarray,
        v: np.ndarray,
        learning_rate: float,
        step: int,
    ) -> None:
        """On a part of a piece, in place: all float32 [n]."""
        self._adamw(
            parameters,
            gradient,
            m,
            v,
            lr=learning_rate * piece.rate,
            beta1=self._beta1,
            beta2=self._beta2,
            eps=self._eps,
            weight_decay=self._decay if piece.decay else 0.0,
            step=step,
        )


def adamw(
    parameters: np.ndarray,
    gradient: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """In place, all float32 [n]. Settings and corrections are rounded to float32, then nothing but
    float32 operations, none of them fused:

    m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) (g g)
    p = p (1 - lr wd)                only with weight decay
    p = p - (lr c1) (m / (sqrt(v c2) + eps)),   c1 = 1 / (1 - b1^t),  c2 = 1 / (1 - b2^t)
    """
    f = np.float32
    b1, b2 = f(beta1), f(beta2)
    rest1, rest2 = f(1) - b1, f(1) - b2
    c1, c2 = f(1 / (1 - beta1**step)), f(1 / (1 - beta2**step))
    rate, keep = f(lr) * c1, f(1) - f(lr) * f(weight_decay)
    for start in range(0, len(parameters), _CHUNK):
        at = slice(start, start + _CHUNK)
        p, g, first, second = parameters[at], gradient[at], m[at], v[at]
        np.multiply(first, b1, out=first)
        work = g * rest1
        np.add(first, work, out=first)
        np.multiply(second, b2, out=second)
        np.multiply(g, g, out=work)
        np.multiply(work, rest2, out=work)
        np.add(second, work, out=second)
        if weight_decay:
            np.multiply(p, keep, out=p)
        np.multiply(second, c2, out=work)
        np.sqrt(work, out=work)
        np.add(work, f(eps), out=work)
        np.divide(first, work, out=work)
        np.multiply(work, rate, out=work)
        np.subtract(p, work, out=p)


def fastest_adamw() -> Callable[..., None]:
    """The native module's where that is built, else `adamw`; both give the same bits."""
    try:
        found: Callable[..., None] = import_module("localllm.train.native").fused_adamw
    except ImportError:
        return adamw
    return found
