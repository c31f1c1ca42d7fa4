"""What computes losses and gradients: the seam between the training loop and a backend.

A method (supervised, DPO, ORPO …) turns log-probabilities into one weight a row; a program knows
nothing else of it: loss = -sum(weight * log p(target)), and its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Sequences laid end to end, without padding; each attends to itself alone, causally.

    tokens: int32 [n]; targets: int32 [n], what follows each token (any id where its weight is 0).
    offsets: int32 [sequences + 1], ascending, from 0 to n. Positions begin at 0 in each sequence.
    first_row: the number of the first row within the whole step (of all its micro-batches), so
        that dropout does not depend on how a step is cut.
    """

    tokens: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    first_row: int = 0


@dataclass(frozen=True)
class Noise:
    """The randomness of one step; the same seed gives the same masks in every program.

    dropout: chance that an input of an adapter's A is zeroed, the others scaled by 1 / (1 - p).
        Entry (row, column) of target t (by its place in `Layout.targets`) is kept if
        mix(mix(mix(seed_low ^ mix(seed_high ^ t)) + row) + column * 0x9E3779B9) >= p * 2**32, all
        in uint32, where mix is the finalizer of MurmurHash3 (x ^= x >> 16; x *= 0x85EBCA6B;
        x ^= x >> 13; x *= 0xC2B2AE35; x ^= x >> 16) and row counts from the step's first.
    neftune: alpha of NEFTune (https://arxiv.org/abs/2310.05914): uniform noise of
        +-alpha / sqrt(length * hidden) on the scaled embeddings, from the same hash with
        t = 0xFFFFFFFF: (hash / 2**31 - 1).
    """

    seed: int = 0  # uint64
    dropout: float = 0.0
    neftune: float = 0.0


@dataclass(frozen=True)
class Layout:
    """Where the trainable parameters lie in one flat float32 vector, in a fixed order.

    For low-rank adapters the names are a target of `localllm.adapters` and what of it:
    "layers.0.attn.q.a" [r, in], "layers.0.attn.q.b" [out, r], with DoRA also
    "layers.0.attn.q.magnitude" [out], and of experts "layers.0.moe.up.a" [E, r, in] and "….b"
    [E, out, r]; for full fine-tuning the weights' own names.
    scales: by target, what multiplies B A x (alpha / r, or alpha / sqrt(r)).
    """

    shapes: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, float]

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.scales)

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    @property
    def places(self) -> dict[str, int]:
        """Where each parameter begins."""
        places, at = {}, 0
        for name, shape in self.shapes.items():
            places[name] = at
            at += int(np.prod(shape))
        return places

    def views(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Each parameter as a view into `flat`, float32 [size]."""
        return dict(self._cut(flat))

    def _cut(self, flat: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        assert flat.shape == (self.size,), f"{flat.shape} for a layout of {self.size}"
        for name, at in self.places.items():
            shape = self.shapes[name]
            yield name, flat[at : at + int(np.prod(shape))].reshape(shape)


class Program(Protocol):
    """A model with trainable parameters, ready to be differentiated.

    parameters, gradient: float32 [layout.size]. Results do not depend on the number of threads.
    survives_full_memory: whether it raises MemoryError where memory cannot be had (MLX crashes).
    """

    name: str
    survives_full_memory: bool
    layout: Layout

    def log_probs(
        self, rows: Rows, parameters: np.ndarray | None, noise: Noise | None = None
    ) -> np.ndarray:
        """float32 [n]: log p(target) of every row; of the base model alone without parameters.

        A program of all weights has a base only if it was opened with one.
        """
        ...

    def gradients(
        self,
        rows: Rows,
        weights: np.ndarray,
        parameters: np.ndarray,
        gradient: np.ndarray,
        noise: Noise | None = None,
    ) -> float:
        """-sum(weights * log p(target)), float32 weights [n]; its gradient is added to `gradient`.

        Rows of weight 0 cost no head. Logits are never held for all rows at once.
        """
        ...

    def working_bytes(self, rows: Sequence[int]) -> int:
        """Memory beyond weights and parameters that a step over sequences of such lengths takes."""
        ...

    def close(self) -> None: ...
