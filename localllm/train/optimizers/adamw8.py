"""AdamW whose running means are held in 8 bits (https://arxiv.org/abs/2110.02861).

A block of 256 entries shares one float32, its largest; an entry is the place of the nearest of 256
values between -1 and 1 (0 and 1 for squares) that lie the closer the smaller they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localllm.train.optimizers.adamw import AdamW
from localllm.train.optimizers.protocol import Piece

BLOCK = 256
_GROUP = 64  # blocks taken at a time


class AdamW8bit(AdamW):
    """State: "m" and "v" uint8 [blocks, 256], with a float32 a block in "m_scale" and "v_scale".

    Blocks begin anew with every parameter, as their sizes differ by orders of magnitude. A mean
    square that is not zero is never rounded to zero, which would let its entry leap.
    """

    name = "adamw-8bit"

    def _begin(self, pieces: Sequence[Piece]) -> None:
        self._pieces = tuple(pieces)
        blocks = sum(_blocks(piece) for piece in pieces)
        self._m, self._m_scale = _zeros(SIGNED, blocks)
        self._v, self._v_scale = _zeros(UNSIGNED, blocks)

    def state(self) -> dict[str, np.ndarray]:
        return {
            "m": self._m,
            "m_scale": self._m_scale,
            "v": self._v,
            "v_scale": self._v_scale,
        }

    def update(
        self, parameters: np.ndarray, gradient: np.ndarray, learning_rate: float, step: int
    ) -> None:
        assert step >= 1, "steps count from 1"
        block = 0
        for piece in self._pieces:
            for start in range(piece.at.start, piece.at.stop, _GROUP * BLOCK):
                at = slice(start, min(start + _GROUP * BLOCK, piece.at.stop))
                here = slice(block, block + -(-(at.stop - at.start) // BLOCK))
                block = here.stop
                m = SIGNED.values[self._m[here]] * self._m_scale[here, None]
                v = UNSIGNED.values[self._v[here]] * self._v_scale[here, None]
                count = at.stop - at.start
                self._step(
                    piece,
                    parameters[at],
                    gradient[at],
                    m.reshape(-1)[:count],
                    v.reshape(-1)[:count],
                    learning_rate,
                    step,
                )
                self._m[here], self._m_scale[here] = SIGNED.encode(m)
                self._v[here], self._v_scale[here] = UNSIGNED.encode(v)


class Code:
    """256 rising values within [-1, 1]."""

    def __init__(self, values: np.ndarray, keep_from_zero: bool) -> None:
        self.values = values.astype(np.float32)
        middles = (values[1:] + values[:-1]) / 2
        self.edges = middles.astype(np.float32)
        self._next_edge = np.append(self.edges, np.float32(np.inf))
        self._first = _first_codes(self.edges)
        self._keep_from_zero = keep_from_zero

    @property
    def zero(self) -> int:
        return int(np.flatnonzero(self.values == 0)[0])

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 [blocks, 256] -> codes uint8 of that shape, scales float32 [blocks]."""
        scale = np.abs(x).max(axis=1)
        shares = x / np.where(scale > 0, scale, np.float32(1))[:, None]
        # What `searchsorted` finds, eight times as fast: the upper 17 bits of a float32 tell the
        # code but for one edge.
        codes = self._first[shares.view(np.uint32) >> np.uint32(15)]
        codes += self._next_edge[codes] < shares
        if self._keep_from_zero:
            codes[(codes == self.zero) & (x != 0)] = self.zero + 1
        return codes, scale


def _first_codes(edges: np.ndarray) -> np.ndarray:
    """uint8 [2^17]: how many edges lie below all floats with these upper 17 bits.

    Edges are 0.7 % of their size apart or more, so between two such prefixes (0.4 %) is one at
    most.
    """
    prefixes = np.arange(1 << 17, dtype=np.uint32) << np.uint32(15)
    lowest = np.where(prefixes >> np.uint32(31), prefixes | np.uint32(0x7FFF), prefixes)
    return np.searchsorted(edges, lowest.astype(np.uint32).view(np.float32)).astype(np.uint8)


def _dynamic(signed: bool) -> np.ndarray:
    """Seven decades, each finer than the one below it: 2 to the power of its number of steps.

    Of 8 bits one is the sign, if there is one; leading zeros of the rest name the decade and the
    bits that remain divide it evenly (dynamic tree quantization, https://arxiv.org/abs/1511.04561).
    """
    values = [0.0, 1.0]
    for decade in range(7):
        steps = 2 ** (decade + (0 if signed else 1))
        edges = np.linspace(0.1, 1, steps + 1)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [*means, *(-means if signed else [])]
    return np.sort(np.array(values))


SIGNED = Code(_dynamic(True), keep_from_zero=False)
UNSIGNED = Code(_dynamic(False), keep_from_zero=True)


def _blocks(piece: Piece) -> int:
    size: int = piece.at.stop - piece.at.start
    return -(-size // BLOCK)


def _zeros(code: Code, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((blocks, BLOCK), code.zero, np.uint8), np.zeros(blocks, np.float32)
