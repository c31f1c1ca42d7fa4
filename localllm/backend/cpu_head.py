"""A draft head in one native call a guess."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from localllm.backend.cpu import CpuBackend
from localllm.backend.cpu_weights import add_matrix
from localllm.backend.protocol import Backend, StepCancelled
from localllm.checkpoint.tensor import Tensor
from localllm.kernels_cpu import _native
from localllm.models.draft_head import DraftHead

if TYPE_CHECKING:
    from localllm.backend.head_network import HeadRows


class CpuHead:
    """See `HeadNetwork`. It holds both backends, but no more of them than they do when closed."""

    def __init__(
        self, head: DraftHead, model: Backend, layer: Backend, rows: Tensor | None
    ) -> None:
        assert isinstance(model, CpuBackend)
        assert isinstance(layer, CpuBackend)
        self._model, self._layer = model, layer
        self._eps = head.spec.layers[0].norm.eps
        self._parts = _native.WeightStore()
        add_matrix(self._parts, "from_hidden", head.from_hidden)
        add_matrix(self._parts, "from_embedding", head.from_embedding)
        self._parts.add_vector("hidden_norm", head.hidden_norm)
        self._parts.add_vector("embedding_norm", head.embedding_norm)
        if rows is not None:
            add_matrix(self._parts, "head", rows)
        self._guessed = model.spec.vocab_size if rows is None else rows.shape[0]

    def run(self, rows: Sequence[HeadRows]) -> tuple[np.ndarray, np.ndarray]:
        """See `HeadNetwork.run`."""
        states = np.empty((len(rows), self._layer.spec.hidden), np.float32)
        logits = np.empty((len(rows), self._guessed), np.float32)
        done = self._layer.native.guess(
            self._model.native,
            self._parts,
            self._eps,
            np.ascontiguousarray(np.concatenate([r.states for r in rows]), np.float32),
            np.array([token for r in rows for token in r.following], np.int32),
            *self._layer.places(rows, [len(r.states) for r in rows]),
            states,
            logits,
        )
        if not done:
            raise StepCancelled("the step was cancelled")
        return states, logits
