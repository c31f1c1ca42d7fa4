"""A model that needs its KV cache: the next token depends on all tokens before it.

Its "KV" is the token ids themselves, written into blocks and read back through block tables, so
that a block that is lost, shared or stale changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from localllm.backend.protocol import Activations, Batch, Chunk, Projection, StepCancelled
from localllm.checkpoint.tensor import Dense, Tensor
from localllm.engine.drafters import HeadDrafter
from localllm.models.draft_head import DraftHead, layer_alone
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
        self.layer: ToyLayer | None = None  # of a draft head
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
            hidden[:] = np.concatenate([_hidden_states(chunk) for chunk in batch.chunks])
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
        return _on_circle(np.array(token_ids), VOCAB)

    def project(self, hidden: np.ndarray) -> np.ndarray:
        """What the head's layer has left for these states."""
        assert self.layer is not None
        known = [self.layer.logits.get(at) for at in _places(hidden)]
        rows = [np.zeros(VOCAB) if logits is None else logits for logits in known]
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


_TURN = 4096 * VOCAB  # hidden states of so many places and tokens, on a circle
_FAINT = np.float32(1e-5)  # of an embedding beside a hidden state


def _on_circle(numbers: np.ndarray, of: int) -> np.ndarray:
    """float32 [n, 2], of root mean square 1, which an RMSNorm leaves as they are."""
    angles = 2 * np.pi * numbers / of
    points: np.ndarray = np.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return points.astype(np.float32)


def _number(points: np.ndarray, of: int) -> np.ndarray:
    angles = np.arctan2(points[:, 1].astype(np.float64), points[:, 0].astype(np.float64))
    return np.rint(angles / (2 * np.pi) * of).astype(np.int64) % of


def _hidden_states(chunk: Chunk) -> np.ndarray:
    """They tell the position and its token."""
    positions = chunk.start + np.arange(len(chunk.token_ids))
    return _on_circle(positions * VOCAB + chunk.token_ids, _TURN)


def _places(hidden: np.ndarray) -> list[tuple[int, int]]:
    return [divmod(int(number), VOCAB) for number in _number(hidden, _TURN)]


class ToyLayer(ToyBackend):
    """The layer of a draft head, which finds out from its inputs alone what they are of.

    Its cells hold position * VOCAB + token. Where it has seen a text from its first token on, it
    knows what the toy will say. logits: those of states it has guessed.
    """

    def __init__(self, num_blocks: int = 16, *, doubt: float = 0.0) -> None:
        super().__init__(num_blocks, doubt=doubt)
        self.logits: dict[tuple[int, int], np.ndarray] = {}

    def part_of_head(self, rows: Tensor) -> Projection:
        return lambda hidden: hidden * rows.to_float32()[0, 0]

    def forward(self, batch: Batch, hidden: np.ndarray | None = None) -> np.ndarray:
        assert hidden is not None
        guessed = []
        for chunk in batch.chunks:
            assert chunk.embeddings is not None
            assert not chunk.logit_rows
            states = _number(chunk.embeddings, _TURN)
            faint = (chunk.embeddings - _on_circle(states, _TURN)) / _FAINT
            following = _number(faint, VOCAB)
            for row, (state, token) in enumerate(zip(states, following, strict=True)):
                at = chunk.start + row
                block, slot = divmod(at, self.block_size)
                self.cells[0][chunk.block_table[0, block], slot] = state
                seen = self.seen(chunk.block_table, at + 1)
                positions, tokens = seen // VOCAB, seen % VOCAB
                assert np.array_equal(positions, positions[0] + np.arange(at + 1))
                place = (int(positions[-1]) + 1, int(token))
                if positions[0] == 0:
                    self.logits[place] = self._logits(np.append(tokens, token))
                guessed.append(place[0] * VOCAB + place[1])
        hidden[:] = _on_circle(np.array(guessed), _TURN)
        return np.zeros((0, 1), np.float32)

    def seen(self, table: np.ndarray, length: int) -> np.ndarray:
        found: np.ndarray = self.cells[0][table[0]].reshape(-1)[:length]
        return found


def toy_head(backend: ToyBackend, num_blocks: int = 16, *, doubt: float = 0.0) -> HeadDrafter:
    """A head that is right wherever it can be, but for its doubt."""
    layer = backend.layer = ToyLayer(num_blocks, doubt=doubt)
    one = np.eye(2, dtype=np.float32)
    gains, exact = np.ones(2, np.float32), NormSpec(eps=1e-12)
    head = DraftHead(
        layer_alone("toy", replace(layer.spec.layers[0], norm=exact), exact, 2, 4096),
        {},
        gains,
        gains,
        Dense(one, "float32"),
        Dense(_FAINT * one, "float32"),
    )
    return HeadDrafter(head, backend, layer)
