"""Adafactor (https://arxiv.org/abs/1804.04235): second moments from means of rows and columns.

With the given learning rate, as fine-tuning wants it: no relative step, no scaling by the
parameter's own size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from localllm.train.optimizers.protocol import Piece, checked_state

_FLOOR = 1e-30  # added to squared gradients
_RATE = -0.8  # the second moment's memory is 1 - step ** rate
_MOST = 1.0  # root mean square of an update, at most


class Adafactor:
    """State: "rows" and "columns" of all matrices end to end, "v" of all vectors, with `beta1` "m".

    beta1: 0 for no running mean of the update, which is a float32 for every parameter.
    """

    name = "adafactor"

    def __init__(
        self, pieces: Sequence[Piece], *, beta1: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        self._pieces = tuple(pieces)
        self._beta1, self._decay = beta1, weight_decay
        matrices = [_sides(piece.shape) for piece in pieces if len(piece.shape) > 1]
        vectors = sum(piece.shape[0] for piece in pieces if len(piece.shape) == 1)
        self._rows = np.zeros(sum(stack * rows for stack, rows, _ in matrices), np.float32)
        self._columns = np.zeros(sum(stack * columns for stack, _, columns in matrices), np.float32)
        self._v = np.zeros(vectors, np.float32)
        self._m = np.zeros(self._pieces[-1].at.stop if pieces and beta1 else 0, np.float32)

    def state(self) -> dict[str, np.ndarray]:
        kept = {"rows": self._rows, "columns": self._columns, "v": self._v}
        return {**kept, "m": self._m} if self._beta1 else kept

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        for name, array in checked_state(self.state(), state):
            array[...] = state[name]

    def update(
        self, parameters: np.ndarray, gradient: np.ndarray, learning_rate: float, step: int
    ) -> None:
        assert step >= 1, "steps count from 1"
        f = np.float32
        keep = f(1 - step**_RATE)
        row = column = vector = 0
        for piece in self._pieces:
            g = gradient[piece.at].reshape(piece.shape)
            squared = g * g + f(_FLOOR)
            if len(piece.shape) > 1:
                stack, rows, columns = _sides(piece.shape)
                squared = squared.reshape(stack, rows, columns)
                r = self._rows[row : row + stack * rows].reshape(stack, rows)
                c = self._columns[column : column + stack * columns].reshape(stack, columns)
                row, column = row + stack * rows, column + stack * columns
                _blend(r, squared.mean(axis=-1, dtype=np.float32), keep)
                _blend(c, squared.mean(axis=-2, dtype=np.float32), keep)
                share = r / r.mean(axis=-1, keepdims=True, dtype=np.float32)
                move = g.reshape(squared.shape) / np.sqrt(share)[:, :, None]
                move /= np.sqrt(c)[:, None, :]
            else:
                v = self._v[vector : vector + piece.shape[0]]
                vector += piece.shape[0]
                _blend(v, squared, keep)
                move = g / np.sqrt(v)
            size = np.sqrt(np.mean(np.square(move, dtype=np.float64)))
            rate = learning_rate * piece.rate
            move *= f(rate / max(1.0, float(size) / _MOST))
            move = move.reshape(-1)
            if self._beta1:
                m = self._m[piece.at]
                _blend(m, move, f(self._beta1))
                move = m
            p = parameters[piece.at]
            if piece.decay and self._decay:
                p *= f(1 - rate * self._decay)
            p -= move


def _sides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """How many matrices a parameter is, and their sides."""
    return int(np.prod(shape[:-2])), shape[-2], shape[-1]


def _blend(old: np.ndarray, new: np.ndarray, keep: np.float32) -> None:
    old *= keep
    old += (np.float32(1) - keep) * new
