"""A model that needs its KV cache: the next token depends on all tokens before it.

Its "KV" is the token ids themselves, written into blocks and read back through block tables, so
that a block that is lost, shared or stale changes the answer.
"""

from __future__ import annotations

import numpy as np

from localllm.backend.protocol import Batch, StepCancelled
from localllm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec

VOCAB = 31


def toy_spec(context: int = 4096) -> DecoderSpec:
    layer = LayerSpec(
        mixer=AttentionSpec(heads=1, kv_heads=1, head_dim=2, scale=1.0),
        ffn=FeedForwardSpec(hidden=2),
        norm=NormSpec(),
    )
    return DecoderSpec("toy", VOCAB, 2, (layer,), NormSpec(), context)


def next_logits(prefix: np.ndarray) -> np.ndarray:
    """float32 [V], a fixed function of the whole prefix."""
    key = 0
    for token in prefix.tolist():
        key = (key * 1_000_003 + token + 1) % 2**61
    return np.random.default_rng(key).normal(size=VOCAB).astype(np.float32) * 2


class ToyBackend:
    name = "toy"
    step_rows = 128
    activations = "float32"
    from_cache = False
    load_note = None

    def __init__(self, num_blocks: int = 16, block_size: int = 4) -> None:
        self.spec = toy_spec()
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.cells = np.full((num_blocks, block_size), -1, dtype=np.int64)
        self.steps: list[list[int]] = []  # rows of each chunk, step by step
        self.fail_on: int | None = None  # raise when a chunk holds this token
        self.cancel_steps: set[int] = set()  # cancelled after the cache was written
        self.closed = False

    def forward(self, batch: Batch) -> np.ndarray:
        self.steps.append([len(chunk.token_ids) for chunk in batch.chunks])
        written: set[int] = set()
        for chunk in batch.chunks:
            used = -(-(chunk.start + len(chunk.token_ids)) // self.block_size)
            own = set(chunk.block_table[:used].tolist())
            assert not own & written, "two sequences of a batch share a block they write"
            written |= own
            for offset, token in enumerate(chunk.token_ids.tolist()):
                block, slot = divmod(chunk.start + offset, self.block_size)
                self.cells[chunk.block_table[block], slot] = token
        if any(self.fail_on in chunk.token_ids.tolist() for chunk in batch.chunks):
            raise RuntimeError("the toy broke")
        if len(self.steps) - 1 in self.cancel_steps:
            raise StepCancelled("cancelled")
        rows = []
        for chunk in batch.chunks:
            for row in chunk.logit_rows:
                length = chunk.start + row + 1
                rows.append(next_logits(self.cells[chunk.block_table].reshape(-1)[:length]))
        return np.array(rows, dtype=np.float32).reshape(-1, VOCAB)

    def cancel(self) -> None:
        self.cancel_steps.add(len(self.steps))

    def close(self) -> None:
        self.closed = True
