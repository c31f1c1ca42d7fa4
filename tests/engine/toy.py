"""A model that needs its KV cache: the next token depends on all tokens before it.

Its "KV" is the token ids themselves, written into blocks and read back through block tables, so
that a block that is lost, shared or stale changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from localllm.backend.protocol import Activations, Batch, Chunk, StepCancelled
from localllm.spec import (
    AttentionSpec,
    DecoderSpec,
    FeedForwardSpec,
    LayerSpec,
    NormSpec,
    ShortConvSpec,
)
from localllm.spec.decoder import Mixer

VOCAB = 31


def toy_spec(
    context: int = 4096, window: int | None = None, recurrent: bool = False
) -> DecoderSpec:
    """One layer that sees all; with `window`, a second one that sees so many positions."""
    mixer = AttentionSpec(heads=1, kv_heads=1, head_dim=2, scale=1.0)
    mixers: list[Mixer] = [mixer] if window is None else [mixer, replace(mixer, window=window)]
    if recurrent:
        mixers.append(ShortConvSpec(channels=2, kernel=2))
    layers = tuple(
        LayerSpec(mixer=m, ffn=FeedForwardSpec(hidden=2), norm=NormSpec()) for m in mixers
    )
    return DecoderSpec("toy", VOCAB, 2, layers, NormSpec(), context)


def next_logits(prefix: np.ndarray) -> np.ndarray:
    """float32 [V], a fixed function of the whole prefix."""
    return np.random.default_rng(key_of(prefix)).normal(size=VOCAB).astype(np.float32) * 2


def key_of(tokens: np.ndarray, key: int = 0) -> int:
    """Of a prefix; key: that of the tokens before."""
    for token in tokens.tolist():
        key = (key * 1_000_003 + token + 1) % 2**61
    return key


class ToyBackend:
    """doubt: of its logits are another function's, as those of a draft model are.

    state_slots: it keeps a state, too, which must agree with the tokens in the blocks.
    """

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
        state_slots: int = 0,
    ) -> None:
        self.spec = toy_spec(window=window, recurrent=state_slots > 0)
        self.state_slots = state_slots
        self.states = np.full((state_slots, 2), -1, dtype=np.int64)  # key and tokens seen
        self.guesses: list[np.ndarray] = []  # of each chunk of the last step
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
        self.guesses.clear()
        keys = [self._carry(chunk) for chunk in batch.chunks]
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
        prefixes, remembered = [], []
        for chunk, own in zip(batch.chunks, keys, strict=True):
            for row in chunk.logit_rows:
                prefixes.append(self._prefix(chunk, chunk.start + row + 1))
                remembered.append(own[row])
        if hidden is not None:
            hidden[:] = np.array([[p[-1], len(p)] for p in prefixes]).reshape(-1, 2)
        for prefix, key in zip(prefixes, remembered, strict=True):
            assert key in (None, key_of(prefix)), "the state and the blocks are of other tokens"
        return np.array(list(map(self._logits, prefixes)), np.float32).reshape(-1, VOCAB)

    def _carry(self, chunk: Chunk) -> list[int | None]:
        """The key after each row, by the states alone."""
        if not self.state_slots:
            assert chunk.state is None
            return [None] * len(chunk.token_ids)
        assert chunk.state is not None
        assert chunk.state.source != chunk.state.target
        key, seen = (0, 0) if chunk.state.source is None else self.states[chunk.state.source]
        assert seen == chunk.start, "a state of another position"
        keys = []
        for token in chunk.token_ids:
            keys.append(key_of(np.array([token]), int(keys[-1] if keys else key)))
        sure = len(keys) - chunk.state.guesses
        self.states[chunk.state.target] = keys[sure - 1], chunk.start + sure
        self.guesses.append(chunk.token_ids[sure:])
        return keys

    def replay(self, chunk: int, first: int, rows: int, source: int, target: int) -> None:
        tokens = self.guesses[chunk][first : first + rows]
        assert len(tokens) == rows > 0
        key, seen = self.states[source]
        self.states[target] = key_of(tokens, int(key)), seen + rows

    def read_state(self, slot: int) -> np.ndarray:
        content: np.ndarray = self.states[slot].view(np.uint8).copy()
        return content

    def write_state(self, slot: int, content: np.ndarray) -> None:
        self.states[slot] = content.view(np.int64)

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
