"""Steps of a backend that can be run again and again: each writes the KV where it wrote before."""

from __future__ import annotations

import numpy as np

from localllm.backend.protocol import Backend, Batch, Chunk, StateSlots


class Steps:
    """Sequences of random tokens in a backend's KV pool, of `lengths` positions at most.

    A step at context c is one whose last row sees c positions, its own included. The positions
    before must have been filled.
    """

    def __init__(self, backend: Backend, lengths: list[int]) -> None:
        self._backend = backend
        random = np.random.default_rng(0)
        self._tokens = random.integers(0, backend.spec.vocab_size, max(lengths), dtype=np.int32)
        self._filled = [0] * len(lengths)
        self._tables: list[np.ndarray] = []
        used = 0
        for length in lengths:
            blocks = -(-length // backend.block_size)
            self._tables.append(np.arange(used, used + blocks, dtype=np.int32))
            used += blocks
        states = backend.state_slots
        assert not states or states >= 2 * len(lengths), f"{len(lengths)} pairs of {states} states"
        assert used <= backend.num_blocks, f"{used} blocks of a pool of {backend.num_blocks}"

    def fill(self, sequence: int, context: int) -> None:
        """Computes the K and V of a sequence's first `context` positions."""
        done = self._filled[sequence]
        while done < context:
            rows = min(self._backend.step_rows, context - done)
            self._run(self._chunk(sequence, done, rows, logits=0))
            done += rows
        self._filled[sequence] = done

    def prefill(self, rows: int) -> None:
        """A prompt of `rows` tokens, in steps as the engine takes them."""
        for start in range(0, rows, self._backend.step_rows):
            count = min(self._backend.step_rows, rows - start)
            self._run(self._chunk(0, start, count, logits=int(start + count == rows)))

    def decode(self, context: int, sequences: int = 1) -> None:
        """The next token of each of the first `sequences` sequences."""
        self._run(*(self._chunk(s, context - 1, 1, logits=1) for s in range(sequences)))

    def verify(self, context: int, drafts: int) -> None:
        """One token and `drafts` drafted ones after it, with the logits of all."""
        self._run(self._chunk(0, context - 1 - drafts, drafts + 1, logits=drafts + 1))

    def _chunk(self, sequence: int, start: int, rows: int, logits: int) -> Chunk:
        tokens = self._tokens[start : start + rows]
        asked = tuple(range(rows - logits, rows))
        state = None
        if self._backend.state_slots:  # always the same two: no content changes what a step costs
            slot = 2 * sequence
            state = StateSlots(slot if start else None, slot + 1)
        return Chunk(tokens, start, self._tables[sequence], asked, start + rows, state=state)

    def _run(self, *chunks: Chunk) -> None:
        self._backend.forward(Batch(chunks))
