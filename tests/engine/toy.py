"""A model that needs its KV cache: the next token depends on all tokens before it.

Its "KV" is the token ids themselves, written into blocks and read back through block tables, so
that a block that is lost, shared or stale changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from localllm.backend.protocol import Activations, Batch, Chunk, StepCancelled
from localllm.spec import AttentionSpec, DecoderSpec, FeedForwardSpec, LayerSpec, NormSpec

VOCAB = 31


def toy_spec(context: int = 4096, window: int | None = None) -> DecoderSpec:
    """One layer that sees all; with `window`, a second one that sees so many positions."""
    mixer = AttentionSpec(heads=1, kv_heads=1, head_dim=2, scale=1.0)
    mixers = [mixer] if window is None else [mixer, replace(mixer, window=window)]
    layers = tuple(
        LayerSpec(mixer=m, ffn=FeedForwardSpec(hidden=2), norm=NormSpec()) for m in mixers
    )
    return DecoderSpec("toy", VOCAB, 2, layers, NormSpec(), context)


def next_logits(prefix: np.ndarray) -> np.ndarray:
    """float32 [V], a fixed function of the whole prefix."""
    key = 0
    for token in prefix.tolist():
        key = (key * 1_000_003 + token + 1) % 2**61
    return np.random.default_rng(key).normal(size=VOCAB).astype(np.float32) * 2


class ToyBackend:
    """doubt: of its logits are another function's, as those of a draft model are."""

    name = "toy"
    step_rows = 128
    activations: Activations = "float32"
    from_cache = False
    load_note = None
    kv_form = "toy"

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        *,
        window: int | None = None,
        window_blocks: int | None = None,
        doubt: float = 0.0,
    ) -> None:
        self.spec = toy_spec(window=window)
        self.num_blocks = num_blocks
        self.group_blocks: tuple[int, ...] = (num_blocks,)
        if window is not None:
            self.group_blocks = (num_blocks, window_blocks or num_blocks)
        self.block_size = block_size
        self.cells = [np.full((n, block_size), -1, dtype=np.int64) for n in self.group_blocks]
        self.steps: list[list[int]] = []  # rows of each chunk, step by step
        self.fail_on: int | None = None  # raise when a chunk holds this token
        self.cancel_steps: set[int] = set()  # cancelled after the cache was written
        self.closed = False
        self.copies = 0
        self._window = window
        self._doubt = doubt

    def forward(self, batch: Batch, hidden: np.ndarray | None = None) -> np.ndarray:
        self.steps.append([len(chunk.token_ids) for chunk in batch.chunks])
        written: set[tuple[int, int]] = set()
        for chunk in batch.chunks:
            used = -(-(chunk.start + len(chunk.token_ids)) // self.block_size)
            for group, cells in enumerate(self.cells):
                table = self._table(chunk, group)
                own = {(group, b) for b in table[chunk.start // self.block_size : used].tolist()}
                assert not own & written, "two sequences of a batch share a block they write"
                assert all(b >= 0 for _, b in own)
                written |= own
                for offset, token in enumerate(chunk.token_ids.tolist()):
                    block, slot = divmod(chunk.start + offset, self.block_size)
                    cells[table[block], slot] = token
        if any(self.fail_on in chunk.token_ids.tolist() for chunk in batch.chunks):
            raise RuntimeError("the toy broke")
        if len(self.steps) - 1 in self.cancel_steps:
            raise StepCancelled("cancelled")
        prefixes = [
            self._prefix(chunk, chunk.start + row + 1)
            for chunk in batch.chunks
            for row in chunk.logit_rows
        ]
        if hidden is not None:
            hidden[:] = np.array([[p[-1], len(p)] for p in prefixes]).reshape(-1, 2)
        return np.array(list(map(self._logits, prefixes)), np.float32).reshape(-1, VOCAB)

    def _table(self, chunk: Chunk, group: int) -> np.ndarray:
        shape = (len(self.group_blocks), chunk.block_table.shape[-1])
        return np.broadcast_to(chunk.block_table, shape)[group]

    def _prefix(self, chunk: Chunk, length: int) -> np.ndarray:
        everything: np.ndarray = self.cells[0][self._table(chunk, 0)].reshape(-1)[:length].copy()
        if self._window is not None:
            first = max(0, length - self._window)
            late: np.ndarray = self.cells[1][self._table(chunk, 1)].reshape(-1)[first:length]
            everything[first:] += late - everything[first:]  # both layers must know them
        return everything

    def _logits(self, prefix: np.ndarray) -> np.ndarray:
        logits = next_logits(prefix)
        if np.random.default_rng(int(prefix.sum()) + len(prefix)).random() < self._doubt:
            return logits[::-1]
        return logits

    def embed(self, token_ids: Sequence[int]) -> np.ndarray:
        return np.array([[token, 0] for token in token_ids], np.float32)

    def project(self, hidden: np.ndarray) -> np.ndarray:
        rows = [np.roll(np.arange(VOCAB), int(h[0])) for h in hidden]
        return np.array(rows, np.float32).reshape(-1, VOCAB)

    def copy_block(self, group: int, source: int, target: int) -> None:
        self.copies += 1
        self.cells[group][target] = self.cells[group][source]

    def read_block(self, group: int, block: int) -> np.ndarray:
        content: np.ndarray = self.cells[group][block].view(np.uint8).copy()
        return content

    def write_block(self, group: int, block: int, content: np.ndarray) -> None:
        self.cells[group][block] = content.view(np.int64)

    def cancel(self) -> None:
        self.cancel_steps.add(len(self.steps))

    def close(self) -> None:
        self.closed = True
