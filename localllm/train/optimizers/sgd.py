"""Stochastic gradient descent, with momentum as torch has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from localllm.train.optimizers.protocol import Piece, checked_state, merged

_CHUNK = 1 << 15


class SGD:
    """m = b1 m + g, then p = p (1 - lr wd) - lr m. Without momentum (b1 = 0) there is no state."""

    name = "sgd"

    def __init__(
        self, pieces: Sequence[Piece], *, beta1: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        self._pieces = merged(pieces)
        self._beta1, self._decay = beta1, weight_decay
        size = self._pieces[-1].at.stop if self._pieces and beta1 else 0
        self._m = np.zeros(size, np.float32)

    def state(self) -> dict[str, np.ndarray]:
        return {"m": self._m} if self._beta1 else {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        for name, array in checked_state(self.state(), state):
            array[...] = state[name]

    def update(
        self, parameters: np.ndarray, gradient: np.ndarray, learning_rate: float, step: int
    ) -> None:
        assert step >= 1, "steps count from 1"
        f = np.float32
        for piece in self._pieces:
            rate = learning_rate * piece.rate
            for start in range(piece.at.start, piece.at.stop, _CHUNK):
                at = slice(start, min(start + _CHUNK, piece.at.stop))
                p, move = parameters[at], gradient[at]
                if self._beta1:
                    m = self._m[at]
                    m *= f(self._beta1)
                    m += move
                    move = m
                if piece.decay and self._decay:
                    p *= f(1 - rate * self._decay)
                p -= f(rate) * move
