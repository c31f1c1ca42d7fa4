"""Draft heads of random weights."""

from __future__ import annotations

import numpy as np

from localllm.checkpoint.tensor import Dense
from localllm.models.draft_head import DraftHead, head_spec, no_vocabulary
from tests.backend.random_models import dense, random_weights


def random_head(hidden: int, tokens: np.ndarray | None = None) -> DraftHead:
    spec = head_spec(
        hidden, heads=4, kv_heads=2, head_dim=16, inner=48, rope_theta=10_000.0, eps=1e-5
    )
    rng = np.random.default_rng(3)
    hidden_norm, embedding_norm = rng.uniform(0.5, 1.5, (2, hidden)).astype(np.float32)
    fuse = rng.normal(0, hidden**-0.5, (2, hidden, hidden)).astype(np.float32)
    weights = {**dense(random_weights(spec)), **no_vocabulary(hidden)}
    return DraftHead(
        spec,
        weights,
        hidden_norm,
        embedding_norm,
        Dense(fuse[0], "float32"),
        Dense(fuse[1], "float32"),
        tokens,
    )
