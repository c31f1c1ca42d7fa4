"""What a draft head computes for a guess (see `localllm.models.draft_head`): in one native call on
`cpu`, composed of what every backend has elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from localllm.backend.protocol import Backend, Batch, Chunk
from localllm.checkpoint.tensor import Tensor
from localllm.models.draft_head import DraftHead


@dataclass(frozen=True)
class HeadRows:
    """Consecutive rows of one sequence.

    states: float32 [n, hidden], the model's or guessed. following: the token after each.
    start: position of the first in the layer's cache, whose blocks block_table [m] names.
    prompt_length: see `Chunk`.
    """

    states: np.ndarray
    following: Sequence[int]
    start: int
    block_table: np.ndarray
    prompt_length: int


class HeadNetwork(Protocol):
    def run(self, rows: Sequence[HeadRows]) -> tuple[np.ndarray, np.ndarray]:
        """Of the last row of each: the state it guesses, float32 [len(rows), hidden], and logits
        float32 [len(rows), M] of the head's tokens.

        Raises StepCancelled where `cancel` of the layer was called meanwhile.
        """
        ...


def head_network(
    head: DraftHead, model: Backend, layer: Backend, rows: Tensor | None
) -> HeadNetwork:
    """layer: `head.spec` with `head.weights`. rows: [M, hidden], those of the model's head that
    stand for `head.tokens`; None for all."""
    assert (rows is None) == (head.tokens is None)
    if model.name == layer.name == "cpu":
        from localllm.backend.cpu_head import CpuHead

        return CpuHead(head, model, layer, rows)
    return _Composed(head, model, layer, rows)


class _Composed:
    def __init__(
        self, head: DraftHead, model: Backend, layer: Backend, rows: Tensor | None
    ) -> None:
        self._eps = head.spec.layers[0].norm.eps
        self._norms = head.hidden_norm, head.embedding_norm
        self._model, self._layer = model, layer
        self._from_hidden = layer.part_of_head(head.from_hidden)
        self._from_embedding = layer.part_of_head(head.from_embedding)
        self._project = model.project if rows is None else model.part_of_head(rows)

    def run(self, rows: Sequence[HeadRows]) -> tuple[np.ndarray, np.ndarray]:
        counts = [len(of.states) for of in rows]
        hidden = np.empty((sum(counts), self._layer.spec.hidden), np.float32)
        self._layer.forward(Batch(tuple(map(self._chunk, rows))), hidden)
        last = hidden[np.cumsum(counts, dtype=np.int64) - 1]
        return last, self._project(last)

    def _chunk(self, of: HeadRows) -> Chunk:
        hidden_norm, embedding_norm = self._norms
        hidden = _rms_norm(of.states, hidden_norm, self._eps)
        embedding = _rms_norm(self._model.embed(of.following), embedding_norm, self._eps)
        return Chunk(
            np.zeros(len(of.states), np.int32),
            of.start,
            of.block_table,
            (),
            of.prompt_length,
            embeddings=self._from_hidden(hidden) + self._from_embedding(embedding),
        )


def _rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    scaled: np.ndarray = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + eps) * gain
    return scaled.astype(np.float32)
